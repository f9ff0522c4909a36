//! Output into documents: kept of each node until it has ended, up to a limit.

use std::collections::HashMap;
use std::io;

use cortex_proto::v1::OutputStream;

use super::output::Destination;
use crate::cli::exec::writer::Captured;

/// Most output that is kept of one node, both streams together. Of what runs at the same time this is
/// all in memory.
const MAX_CAPTURED_BYTES: usize = 1024 * 1024;

/// See the module.
#[derive(Default)]
pub(super) struct Documents {
    running: HashMap<String, Captured>,
}

impl Destination for Documents {
    fn write(&mut self, node: &str, stream: OutputStream, data: &[u8]) -> io::Result<()> {
        if !self.running.contains_key(node) {
            self.running.insert(node.to_owned(), Captured::default());
        }
        if let Some(captured) = self.running.get_mut(node) {
            captured.take(stream, data, MAX_CAPTURED_BYTES);
        }
        Ok(())
    }

    fn end(&mut self, node: &str) -> io::Result<Captured> {
        Ok(self.running.remove(node).unwrap_or_default())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}
