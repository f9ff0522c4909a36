//! What little of git's own files has to be understood to know what git will obey. Pure.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// A setting that makes git take programs or further settings from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Setting {
    /// `core.hooksPath`: relative to the working tree.
    Hooks(PathBuf),
    /// `include.path`, `includeIf.….path`: relative to the file it is in.
    Include(PathBuf),
}

/// The directory that a `.git` file names.
pub(super) fn named_directory(text: &[u8]) -> Option<PathBuf> {
    let named = text.strip_prefix(b"gitdir:")?.trim_ascii();
    (!named.is_empty()).then(|| path(named))
}

/// The settings of a configuration file, in order. What is not understood is none.
pub(super) fn settings(text: &[u8]) -> Vec<Setting> {
    let mut section = Vec::new();
    let mut found = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        let mut line = line.trim_ascii();
        if let Some(header) = line.strip_prefix(b"[") {
            // A setting may follow on the same line.
            let Some(end) = header.iter().position(|byte| *byte == b']') else { continue };
            section = header[..end].to_ascii_lowercase();
            line = header[end + 1..].trim_ascii();
        }
        let Some(equals) = line.iter().position(|byte| *byte == b'=') else { continue };
        let name = line[..equals].trim_ascii().to_ascii_lowercase();
        let value = value(line[equals + 1..].trim_ascii());
        let is_include = section == b"include" || section.starts_with(b"includeif ");
        if section == b"core" && name == b"hookspath" {
            found.push(Setting::Hooks(path(&value)));
        } else if is_include && name == b"path" {
            found.push(Setting::Include(path(&value)));
        }
    }
    found
}

fn path(bytes: &[u8]) -> PathBuf {
    Path::new(OsStr::from_bytes(bytes)).to_owned()
}

/// A value without quotes, escapes and comment.
fn value(text: &[u8]) -> Vec<u8> {
    let mut value = Vec::new();
    let mut quoted = false;
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => quoted = !quoted,
            b'\\' => value.extend(bytes.next()),
            b'#' | b';' if !quoted => break,
            byte => value.push(*byte),
        }
    }
    value.trim_ascii_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_found_in_every_way_of_writing_them() {
        let text = b"[core]\n\tbare = false\n\thooksPath = \"a b\" ; hooks\n[include] path=x#y\n\
            [includeIf \"gitdir:~/\"]\n PATH = ../z\\\\w\n[other]\npath = no\n[CORE]\nHOOKSPATH=.husky/_\n";
        let hooks = |path: &str| Setting::Hooks(path.into());
        let include = |path: &str| Setting::Include(path.into());
        assert_eq!(
            settings(text),
            [hooks("a b"), include("x"), include("../z\\w"), hooks(".husky/_")]
        );
        assert_eq!(settings(b"[core\nhooksPath\n=\n\xff[]]"), []);
    }

    #[test]
    fn a_git_file_names_a_directory() {
        assert_eq!(named_directory(b"gitdir: ../a b\n"), Some("../a b".into()));
        assert_eq!(named_directory(b"gitdir:\n"), None);
        assert_eq!(named_directory(b"else"), None);
    }
}
