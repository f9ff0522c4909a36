//! How files look: to people, and to programs.

use cortex_proto::v1;
use cortex_shared::text::{hex, is_printable};
use serde::Serialize;

use crate::cli::printer::time;

/// A name or path for people. What does not show as itself is written out: `\n`, `\u{202e}`, bytes that
/// are no text as `\xff`; a backslash is doubled, so that no two names look alike.
pub(super) fn shown(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str(r"\\"),
                c if is_printable(c) => text.push(c),
                c => text.extend(c.escape_default()),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!(r"\x{byte:02x}"));
        }
    }
    text
}

/// One file for programs.
#[derive(Debug, Serialize)]
pub(super) struct FileView {
    /// As text; what is none stands as U+FFFD.
    name: String,
    /// The bytes of a name that is no text.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_hex: Option<String>,
    kind: &'static str,
    size: u64,
    mode: String,
    mtime_ns: i64,
    uid: u32,
    gid: u32,
    target: Option<String>,
    hash: Option<String>,
}

impl From<&v1::FileInfo> for FileView {
    fn from(info: &v1::FileInfo) -> Self {
        let name = String::from_utf8_lossy(&info.name).into_owned();
        let name_hex = (name.as_bytes() != info.name.as_ref()).then(|| hex(&info.name));
        let link = info.kind() == v1::FileKind::Link;
        Self {
            name,
            name_hex,
            kind: kind(info),
            size: info.size,
            mode: format!("{:04o}", info.mode),
            mtime_ns: info.mtime_ns,
            uid: info.uid,
            gid: info.gid,
            target: link.then(|| String::from_utf8_lossy(&info.target).into_owned()),
            hash: (!info.hash.is_empty()).then(|| hex(&info.hash)),
        }
    }
}

fn kind(info: &v1::FileInfo) -> &'static str {
    match info.kind() {
        v1::FileKind::File => "file",
        v1::FileKind::Directory => "directory",
        v1::FileKind::Link => "link",
        v1::FileKind::Other => "other",
    }
}

/// The heading of [`row`]s.
pub(super) const HEADING: &str = "MODE                SIZE  MODIFIED              NAME\n";

/// One line of a list. The columns have a width of their own, since a list is not known as a whole.
pub(super) fn row(info: &v1::FileInfo) -> String {
    let name = shown(&info.name);
    let name = match info.kind() {
        v1::FileKind::Directory => format!("{name}/"),
        v1::FileKind::Link => format!("{name} -> {}", shown(&info.target)),
        v1::FileKind::File | v1::FileKind::Other => name,
    };
    format!("{}  {:>12}  {:<20}  {name}\n", permissions(info), info.size, modified(info))
}

/// Lines for one file.
pub(super) fn lines(info: &v1::FileInfo) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("name", shown(&info.name)),
        ("kind", kind(info).to_owned()),
        ("size", info.size.to_string()),
        ("mode", format!("{:04o} {}", info.mode, permissions(info))),
        ("modified", modified(info)),
        ("owner", format!("{}:{}", info.uid, info.gid)),
    ];
    if info.kind() == v1::FileKind::Link {
        lines.push(("target", shown(&info.target)));
    }
    if !info.hash.is_empty() {
        lines.push(("hash", hex(&info.hash)));
    }
    lines
}

fn modified(info: &v1::FileInfo) -> String {
    time(info.mtime_ns.div_euclid(1_000_000))
}

/// As `ls -l` has them.
fn permissions(info: &v1::FileInfo) -> String {
    let kind = match info.kind() {
        v1::FileKind::File => '-',
        v1::FileKind::Directory => 'd',
        v1::FileKind::Link => 'l',
        v1::FileKind::Other => '?',
    };
    let bits = (0..9).rev().zip("rwxrwxrwx".chars());
    let bits = bits.map(|(bit, letter)| if info.mode >> bit & 1 == 1 { letter } else { '-' });
    std::iter::once(kind).chain(bits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_play_with_the_terminal_or_are_no_text_are_written_out() {
        for (name, text) in [
            (&b"plain \xc3\xa4"[..], "plain ä"),
            (b"a\nb\x1b[2J", r"a\nb\u{1b}[2J"),
            (b"\xff\xfe", r"\xff\xfe"),
            (br"\xff", r"\\xff"),
            ("a\u{202e}b".as_bytes(), r"a\u{202e}b"),
        ] {
            assert_eq!(shown(name), text);
        }
        let info = |name: &'static [u8]| v1::FileInfo { name: name.into(), ..Default::default() };
        assert_eq!(FileView::from(&info(b"a\xff")).name_hex.unwrap(), "61ff");
        assert_eq!(FileView::from(&info("ä".as_bytes())).name_hex, None);
    }

    #[test]
    fn a_row_says_what_ls_says() {
        let info = v1::FileInfo {
            name: "run".into(),
            kind: v1::FileKind::Link.into(),
            target: "to".into(),
            mode: 0o751,
            size: 2,
            mtime_ns: 1_700_000_000_000_000_000,
            ..Default::default()
        };
        assert_eq!(row(&info), "lrwxr-x--x             2  2023-11-14T22:13:20Z  run -> to\n");
        assert_eq!(HEADING.find("NAME"), row(&info).find("run"));
    }
}
