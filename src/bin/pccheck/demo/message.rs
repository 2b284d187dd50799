//! What a trainer tells its parent: one line each, written at once, so that a kill never tears one.

use std::io::{self, Write};

use pccheck::{Error, Result};

/// One line from a trainer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Message {
    /// Training begins after `step` updates, from the checkpoint of `generation` (0: from scratch).
    Started {
        /// Updates that the state has seen.
        step: u64,
        /// Generation that it was restored from, 0 for none.
        generation: u64,
        /// Newer checkpoints that turned out to be damaged.
        passed_over: u64,
        /// From the start of the process until here, in microseconds.
        after_us: u64,
    },
    /// Loss of an iteration, by its bits.
    Loss {
        /// Number of the iteration, from 0.
        iteration: u64,
        /// The loss in nats.
        bits: u32,
    },
    /// What the save after `step` updates cost the training, in microseconds.
    Copied {
        /// Updates that the saved state has seen.
        step: u64,
        /// Time that training stood still.
        stall_us: u64,
    },
    /// The save after `step` updates will survive a kill.
    Durable {
        /// Updates that the saved state has seen.
        step: u64,
        /// From begin to durable, in microseconds.
        after_us: u64,
    },
    /// Training is over.
    Done {
        /// Digest of the final state.
        digest: u128,
        /// Share of test digits that the network reads rightly, by the bits of an f64.
        accuracy_bits: u64,
    },
}

impl Message {
    /// Tells the parent. Fails when it is gone.
    pub fn send(&self) -> Result<()> {
        let line = match *self {
            Message::Started { step, generation, passed_over, after_us } => {
                format!("started {step} {generation} {passed_over} {after_us}\n")
            }
            Message::Loss { iteration, bits } => format!("loss {iteration} {bits}\n"),
            Message::Copied { step, stall_us } => format!("copied {step} {stall_us}\n"),
            Message::Durable { step, after_us } => format!("durable {step} {after_us}\n"),
            Message::Done { digest, accuracy_bits } => format!("done {digest} {accuracy_bits}\n"),
        };
        let mut stdout = io::stdout().lock();
        let sent = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
        sent.map_err(|e| Error::io("tell the parent process", &e))
    }

    /// Reads a line; `None` for what no trainer writes.
    pub fn parse(line: &str) -> Option<Message> {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let mut number = || words.next()?.parse::<u128>().ok();
        let digest = number()?;
        let first = u64::try_from(digest);
        let mut next = || u64::try_from(number()?).ok();
        let message = match name {
            "started" => Message::Started {
                step: first.ok()?,
                generation: next()?,
                passed_over: next()?,
                after_us: next()?,
            },
            "loss" => Message::Loss { iteration: first.ok()?, bits: u32::try_from(next()?).ok()? },
            "copied" => Message::Copied { step: first.ok()?, stall_us: next()? },
            "durable" => Message::Durable { step: first.ok()?, after_us: next()? },
            "done" => Message::Done { digest, accuracy_bits: next()? },
            _ => return None,
        };
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_are_written() {
        let digest = u128::MAX - 5;
        assert_eq!(
            Message::parse(&format!("done {digest} 7")),
            Some(Message::Done { digest, accuracy_bits: 7 })
        );
        assert_eq!(Message::parse("loss 3 9"), Some(Message::Loss { iteration: 3, bits: 9 }));
        for torn in ["", "loss", "loss 3", "loss 3 x", "los 3 9", "started 1 2 3", "durable -1 2"] {
            assert_eq!(Message::parse(torn), None, "{torn}");
        }
    }
}
