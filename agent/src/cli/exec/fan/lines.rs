//! Output as it comes, line by line: lines of different nodes never mix.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use cortex_proto::v1::OutputStream;

use super::output::Destination;
use crate::cli::exec::writer::{Captured, pass, write_ours};

/// Longest line that is kept together; of a longer one each part is a line.
const MAX_LINE_BYTES: usize = 16 * 1024;

/// Beginnings of lines, of both streams of a node.
#[derive(Default)]
struct Unfinished([Vec<u8>; 2]);

/// See the module.
pub(super) struct Lines {
    prefix: bool,
    out: [File; 2],
    gathered: [Vec<u8>; 2],
    nodes: HashMap<String, Unfinished>,
}

impl Lines {
    pub(super) fn new(prefix: bool) -> io::Result<Self> {
        let nodes = HashMap::new();
        Ok(Self { prefix, out: pass()?, gathered: Default::default(), nodes })
    }
}

impl Destination for Lines {
    fn write(&mut self, node: &str, stream: OutputStream, data: &[u8]) -> io::Result<()> {
        let index = index(stream);
        if !self.nodes.contains_key(node) {
            self.nodes.insert(node.to_owned(), Unfinished::default());
        }
        let prefix = self.prefix.then_some(node);
        if let Some(unfinished) = self.nodes.get_mut(node) {
            cut_lines(&mut unfinished.0[index], data, prefix, &mut self.gathered[index]);
        }
        Ok(())
    }

    fn end(&mut self, node: &str) -> io::Result<Captured> {
        if let Some(unfinished) = self.nodes.remove(node) {
            for (index, line) in unfinished.0.into_iter().enumerate() {
                if !line.is_empty() {
                    let prefix = self.prefix.then_some(node);
                    put_line(&line, prefix, &mut self.gathered[index]);
                }
            }
        }
        Ok(Captured::default())
    }

    fn flush(&mut self) -> io::Result<()> {
        for (gathered, stream) in self.gathered.iter_mut().zip(STREAMS) {
            let written = write_ours(&mut self.out, stream, gathered);
            gathered.clear();
            written?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// In the order of [`index`].
pub(super) const STREAMS: [OutputStream; 2] = [OutputStream::Stdout, OutputStream::Stderr];

pub(super) fn index(stream: OutputStream) -> usize {
    match stream {
        OutputStream::Stdout => 0,
        OutputStream::Stderr => 1,
    }
}

/// Puts whole lines into `out`, and keeps the beginning of the last in `unfinished`.
fn cut_lines(unfinished: &mut Vec<u8>, data: &[u8], prefix: Option<&str>, out: &mut Vec<u8>) {
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        for part in line.chunks(MAX_LINE_BYTES) {
            let ends = part.ends_with(b"\n");
            let part = part.strip_suffix(b"\n").unwrap_or(part);
            if unfinished.len() + part.len() > MAX_LINE_BYTES {
                put_line(unfinished, prefix, out);
                unfinished.clear();
            }
            unfinished.extend_from_slice(part);
            if ends {
                put_line(unfinished, prefix, out);
                unfinished.clear();
            }
        }
    }
}

fn put_line(line: &[u8], prefix: Option<&str>, out: &mut Vec<u8>) {
    if let Some(prefix) = prefix {
        out.extend_from_slice(prefix.as_bytes());
        out.extend_from_slice(b": ");
    }
    out.extend_from_slice(line);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(pieces: &[&[u8]]) -> (String, usize) {
        let (mut unfinished, mut out) = (Vec::new(), Vec::new());
        for piece in pieces {
            cut_lines(&mut unfinished, piece, Some("n"), &mut out);
        }
        (String::from_utf8(out).unwrap(), unfinished.len())
    }

    #[test]
    fn lines_come_whole_and_with_their_node() {
        for (pieces, shown, kept) in [
            (&[b"a\nb\n".as_slice()] as &[&[u8]], "n: a\nn: b\n", 0),
            (&[b"a", b"b\nc"], "n: ab\n", 1),
            (&[b"\n\n"], "n: \nn: \n", 0),
            (&[b""], "", 0),
        ] {
            assert_eq!(cut(pieces), (shown.to_owned(), kept), "{pieces:?}");
        }
    }

    #[test]
    fn a_line_without_end_is_shown_in_parts_and_not_kept() {
        let endless = vec![b'x'; 10 * MAX_LINE_BYTES + 5];
        let (shown, kept) = cut(&[&endless]);
        assert_eq!(shown.lines().count(), 10);
        assert_eq!(kept, 5);
        let (shown, _) = cut(&[&vec![b'x'; MAX_LINE_BYTES], b"\n"]);
        assert_eq!(shown.lines().count(), 1, "a line of exactly the longest length is one line");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_added(
            pieces in proptest::collection::vec(proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..50), 0..20),
        ) {
            let whole = pieces.concat();
            let (mut unfinished, mut out) = (Vec::new(), Vec::new());
            for piece in &pieces {
                cut_lines(&mut unfinished, piece, None, &mut out);
            }
            out.extend(unfinished);
            prop_assert_eq!(out, whole);
        }
    }
}
