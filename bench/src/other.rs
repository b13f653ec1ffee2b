//! The other process of a measurement: this program once more. Its first line of output has the port that it listens on.

use std::io::{self, BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Stdio};

/// It ends with this.
#[derive(Debug)]
pub struct Other {
    child: Child,
    /// Kept open, since it says something at its end.
    _output: BufReader<ChildStdout>,
    port: u16,
}

impl Other {
    /// Starts it, and returns when it listens.
    ///
    /// # Errors
    /// It cannot be started, or ends before it listens.
    pub fn start(arguments: &[&str]) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?).args(arguments).stdout(Stdio::piped()).spawn()?;
        let mut output = BufReader::new(child.stdout.take().ok_or_else(|| io::Error::other("no output"))?);
        let mut line = String::new();
        let read = output.read_line(&mut line);
        let mut other = Self { child, _output: output, port: 0 };
        read?;
        other.port = line.trim().parse().map_err(|_| io::Error::other("the other process does not come up"))?;
        Ok(other)
    }

    /// A connection to it, without Nagle's delay.
    ///
    /// # Errors
    /// Of the network.
    pub fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
