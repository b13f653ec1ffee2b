//! Memory errors that the daemon has not recorded yet: kept in order until it has. Pure.

use std::collections::VecDeque;

use serde_json::{Value, json};

/// Errors told or to be told, oldest first.
#[derive(Debug, Default)]
pub struct Untold {
    last_seq: u64,
    waiting: VecDeque<(u64, Value)>,
}

impl Untold {
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

    /// The daemon has this one on disk.
    pub fn recorded(&mut self, seq: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != seq);
    }

    /// Those to be sent again to a new connection.
    pub fn waiting(&self) -> impl Iterator<Item = &Value> {
        self.waiting.iter().map(|(_, message)| message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unanswered_errors_keep_number_and_order() {
        let mut untold = Untold::default();
        for gpa in [4096, 8192, 12288] {
            untold.add(json!({"gpa": gpa}));
        }
        untold.recorded(2);
        let left: Vec<_> = untold.waiting().map(|message| message["seq"].as_u64().unwrap()).collect();
        assert_eq!(left, [1, 3]);
        assert_eq!(untold.add(json!({"gpa": 0}))["seq"], 4);
    }
}
