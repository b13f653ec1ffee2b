//! The network path of a lane: how its connection outlives an outage, and whether full packets pass.
//!
//! A path with a smaller MTU than its ends may drop larger packets without ICMP. Calls between daemons, `OpenLane` and
//! asks are small, and pass. So a lane begins with full packets each way.

use std::os::fd::AsRawFd;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::frame::{LaneToken, MAGIC, hello};
use crate::sys::tcp::{self, TcpInfo};

/// Bytes of each probe: a full packet with an MTU of 9000 too, and no more than TCP sends in its first round trip or two.
pub const PROBE_BYTES: usize = 16 << 10;
/// The source answers a probe with this, alone in a packet, before it sends its own.
pub const PROBE_ANSWER: [u8; MAGIC.len()] = MAGIC;

/// The longest pause between two retransmissions: a lane resumes so long after an outage.
const RTO_MAX: Duration = Duration::from_secs(1);
/// How long a lane may be without an acknowledgement at least. As long as TCP waits by itself with its own pauses.
pub const LANE_USER_TIMEOUT: Duration = Duration::from_secs(900);
/// A silent lane is probed so often.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// Headers of TCP and IP, with timestamps.
const OVERHEAD_BYTES: u32 = 52;

/// Why a lane is not to be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The connection.
    #[error(transparent)]
    Connection(#[from] std::io::Error),
    /// It does not follow the contract.
    #[error("the source answers a probe with {0:?}")]
    NotALane([u8; MAGIC.len()]),
    /// Small packets pass.
    #[error(
        "packets of {bytes} bytes from the {from} do not arrive, and small ones do: the path has a smaller MTU and drops \
         larger packets without ICMP; set the MTU of the hosts' interfaces to that of the path"
    )]
    FullPacketsVanish {
        /// "source" or "destination".
        from: &'static str,
        /// Of a full packet.
        bytes: u32,
    },
    /// Neither small packets nor large ones.
    #[error("no answer to a probe of the path in {0:?}")]
    Silent(Duration),
}

/// Sets a lane's connection up, before or after it is made. A kernel without an option keeps its own way.
pub fn outlive_outages(socket: &impl AsRawFd, patience: Duration) {
    // A cap on the pauses makes the same number of retransmissions a shorter time, so the time is set as well.
    let set = tcp::set_user_timeout(socket, patience)
        .and_then(|()| tcp::set_keepalive(socket, KEEPALIVE))
        .and_then(|()| tcp::set_rto_max(socket, RTO_MAX));
    if let Err(error) = set {
        tracing::debug!(%error, "lane.option_unknown");
    }
}

/// The destination's part: says hello, sends a probe, and takes that of the source.
///
/// # Errors
/// [`PathError`].
pub async fn probe(stream: &mut TcpStream, token: &LaneToken, within: Duration) -> Result<(), PathError> {
    let mut answer = [0; PROBE_ANSWER.len()];
    let mut answered = false;
    let exchange = async {
        stream.write_all(&hello(token)).await?;
        stream.write_all(&[0; PROBE_BYTES]).await?;
        stream.read_exact(&mut answer).await?;
        answered = true;
        let mut probe = [0; PROBE_BYTES];
        stream.read_exact(&mut probe).await.map(drop)
    };
    match tokio::time::timeout(within, exchange).await {
        Ok(Ok(())) if answer == PROBE_ANSWER => Ok(()),
        Ok(Ok(())) => Err(PathError::NotALane(answer)),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(silence(stream, answered, within)),
    }
}

/// Tells from the acknowledged bytes why nothing came.
fn silence(stream: &TcpStream, answered: bool, within: Duration) -> PathError {
    let Ok(Some(info)) = TcpInfo::of(stream) else { return PathError::Silent(within) };
    let bytes = info.mss + OVERHEAD_BYTES;
    // The SYN counts as one.
    let hello_arrived = info.bytes_acked > super::frame::HELLO_BYTES as u64;
    match answered {
        true => PathError::FullPacketsVanish { from: "source", bytes },
        false if hello_arrived && info.segments_unacked > 0 => {
            PathError::FullPacketsVanish { from: "destination", bytes }
        }
        false => PathError::Silent(within),
    }
}

/// The source's part, after the hello: takes the probe, and sends its own.
///
/// # Errors
/// The connection.
pub async fn answer_probe(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.read_exact(&mut [0; PROBE_BYTES]).await?;
    stream.write_all(&PROBE_ANSWER).await?;
    stream.write_all(&[0; PROBE_BYTES]).await
}
