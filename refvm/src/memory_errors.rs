//! Memory errors that the daemon has not recorded yet, in order. Pure.

use std::collections::VecDeque;

use serde_json::{Value, json};

/// Reports without an answer of the daemon, oldest first.
#[derive(Debug, Default)]
pub struct UnrecordedErrors {
    last_seq: u64,
    waiting: VecDeque<(u64, Value)>,
}

impl UnrecordedErrors {
    /// Numbers an error (an object with `gpa`, `lsb`, `severity`, `guest_visible`, `thread`) and returns its message.
    pub fn add(&mut self, error: Value) -> Value {
        self.last_seq += 1;
        let mut message = json!({"type": "memory_error", "seq": self.last_seq});
        if let (Some(message), Value::Object(fields)) = (message.as_object_mut(), error) {
            message.extend(fields);
        }
        self.waiting.push_back((self.last_seq, message.clone()));
        message
    }

    /// Forgets an error that the daemon has on disk.
    pub fn recorded(&mut self, seq: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != seq);
    }

    /// The messages for a new connection.
    pub fn waiting(&self) -> impl Iterator<Item = &Value> {
        self.waiting.iter().map(|(_, message)| message)
    }
}

#[cfg(test)]
mod tests;
