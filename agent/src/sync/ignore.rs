//! Which names are not part of a workspace.
//!
//! Two things are always left out: `.git`, at any depth (a repository is only consistent as a whole,
//! and a member that could place files in another's `.git/hooks` could have them executed there), and
//! `.cortex` at the top, which is ours. The rest is said by `.cortexignore` at the root, in the
//! syntax of `.gitignore`. That file is synced: the hub orders its versions and takes nothing from a
//! member that went by older rules than the hub has, so all of them switch before they send anything.
//! What is newly left out is deleted nowhere; what is no longer left out is merged.
//!
//! A rule that begins with `(?d)` says that what it leaves out may be removed with its directory, when
//! that is deleted elsewhere; otherwise it stays, and the directory with it.
//!
//! Rules come from other members and are bounded; too many or too long ones are not obeyed but told.

use std::fmt;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cortex_shared::entry::Digest;
use cortex_shared::wire_path::{PRIVATE_NAME, RULES_NAME, WirePath};
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::root_dir::{FileKind, RootDir};

/// Longest file of rules.
const MAX_RULES_BYTES: u64 = 64 * 1024;
/// Most rules, and the longest one in bytes.
const MAX_RULES: usize = 2000;
const MAX_RULE_BYTES: usize = 512;
/// Before a rule: what it leaves out may be removed with its directory.
const REMOVABLE: &str = "(?d)";

/// Names that are neither walked, watched, sent nor accepted from others. Cheap to clone.
#[derive(Clone, Default)]
pub struct Ignore {
    rules: Option<Arc<Rules>>,
}

struct Rules {
    /// Digest of the file they come from.
    content: Digest,
    matcher: Gitignore,
    /// Some of them begin with [`REMOVABLE`].
    lets_remove_any: bool,
    /// Lines that are not obeyed, and why.
    refused: Vec<String>,
}

impl fmt::Debug for Ignore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Ignore").field(&self.version()).finish()
    }
}

impl Ignore {
    /// Reads the rules of a workspace.
    ///
    /// # Errors
    /// Those of the file system, except that there are no rules.
    pub fn load(root: &RootDir) -> io::Result<Self> {
        let file = match root.top().open_file(RULES_NAME) {
            Ok(file) => file,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::InvalidInput
                ) =>
            {
                return Ok(Self::default());
            }
            // A link or a directory of that name says nothing.
            Err(_)
                if root.top().lstat(RULES_NAME).is_ok_and(|meta| meta.kind != FileKind::File) =>
            {
                return Ok(Self::default());
            }
            Err(error) => return Err(error),
        };
        let mut text = Vec::new();
        file.reader().take(MAX_RULES_BYTES + 1).read_to_end(&mut text)?;
        Ok(Self::parse(&text))
    }

    /// Takes the rules from the content of their file.
    #[must_use]
    pub fn parse(text: &[u8]) -> Self {
        let mut refused = Vec::new();
        let mut lets_remove_any = false;
        // The matcher wants a root that names are relative to; ours are relative already.
        let mut builder = GitignoreBuilder::new("");
        if text.len() as u64 > MAX_RULES_BYTES {
            refused.push(format!("the file is longer than {MAX_RULES_BYTES} bytes"));
        } else {
            for (number, line) in text.split(|&byte| byte == b'\n').enumerate() {
                let number = number + 1;
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                let Ok(line) = std::str::from_utf8(line) else {
                    refused.push(format!("line {number} is not UTF-8"));
                    continue;
                };
                if number > MAX_RULES || line.len() > MAX_RULE_BYTES {
                    refused.push(format!("line {number} is too long, or one too many"));
                } else {
                    // A matcher can note for each rule where it comes from; ours all come from one file,
                    // so that says which kind of rule it is.
                    let (kind, rule) = match line.strip_prefix(REMOVABLE) {
                        Some(rule) => (Some(PathBuf::from(REMOVABLE)), rule),
                        None => (None, line),
                    };
                    lets_remove_any |= kind.is_some();
                    if let Err(error) = builder.add_line(kind, rule) {
                        refused.push(format!("line {number}: {error}"));
                    }
                }
            }
        }
        let matcher = builder.build().unwrap_or_else(|error| {
            refused.push(error.to_string());
            Gitignore::empty()
        });
        refused.truncate(8);
        let content = Digest::of(text);
        Self { rules: Some(Arc::new(Rules { content, matcher, lets_remove_any, refused })) }
    }

    /// Which version of the rules this is: the digest of their file, `None` without one.
    #[must_use]
    pub fn version(&self) -> Option<Digest> {
        self.rules.as_ref().map(|rules| rules.content)
    }

    /// Lines that are not obeyed, and why.
    #[must_use]
    pub fn refused(&self) -> &[String] {
        self.rules.as_ref().map_or(&[], |rules| &rules.refused)
    }

    /// Whether `name` in `directory` (the root for `None`) is left out whatever it is.
    #[must_use]
    pub fn ignores_name(&self, directory: Option<&WirePath>, name: &[u8]) -> bool {
        name == b".git" || (directory.is_none() && name == PRIVATE_NAME)
    }

    /// Whether the rules leave out a path, if they leave out nothing above it.
    #[must_use]
    pub fn ignores_entry(&self, path: &WirePath, is_dir: bool) -> bool {
        // Names that are always left out were passed over before.
        self.rules.is_some() && self.rule_for(path, is_dir).is_some()
    }

    /// Rules of which nothing is obeyed: their file is too long.
    #[must_use]
    pub fn too_long(content: Digest) -> Self {
        let refused = vec![format!("the file is longer than {MAX_RULES_BYTES} bytes")];
        let (matcher, lets_remove_any) = (Gitignore::empty(), false);
        Self { rules: Some(Arc::new(Rules { content, matcher, lets_remove_any, refused })) }
    }

    /// Whether a file of rules of this length is too long.
    #[must_use]
    pub fn is_too_long(size: u64) -> bool {
        size > MAX_RULES_BYTES
    }

    /// Whether a path, or anything above it, is left out.
    #[must_use]
    pub fn ignores(&self, path: &WirePath, is_dir: bool) -> bool {
        self.why(path, is_dir).is_some()
    }

    /// Whether there are rules that let anything be removed with its directory.
    #[must_use]
    pub fn lets_remove_any(&self) -> bool {
        self.rules.as_ref().is_some_and(|rules| rules.lets_remove_any)
    }

    /// Whether a path is left out by a rule that lets it be removed with its directory.
    #[must_use]
    pub fn lets_remove(&self, path: &WirePath, is_dir: bool) -> bool {
        let Some(rules) = &self.rules else { return false };
        !self.ignores_name(path.parent().as_ref(), path.name())
            && path.as_bytes() != RULES_NAME
            && matches!(rules.matcher.matched(as_path(path), is_dir),
                ignore::Match::Ignore(glob) if glob.from().is_some())
    }

    /// Which rule leaves out a path, or something above it.
    #[must_use]
    pub fn why(&self, path: &WirePath, is_dir: bool) -> Option<String> {
        let mut above: Vec<WirePath> = path.ancestors().collect();
        above.reverse();
        for ancestor in &above {
            if let Some(rule) = self.rule_for(ancestor, true) {
                return Some(rule);
            }
        }
        self.rule_for(path, is_dir)
    }

    fn rule_for(&self, path: &WirePath, is_dir: bool) -> Option<String> {
        if self.ignores_name(path.parent().as_ref(), path.name()) {
            return Some("it is always left out".to_owned());
        }
        // Without them, nobody would know what is left out.
        if path.as_bytes() == RULES_NAME {
            return None;
        }
        let rules = self.rules.as_ref()?;
        match rules.matcher.matched(as_path(path), is_dir) {
            ignore::Match::Ignore(glob) => Some(format!("{:?} in .cortexignore", glob.original())),
            ignore::Match::None | ignore::Match::Whitelist(_) => None,
        }
    }
}

fn as_path(path: &WirePath) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(path.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> WirePath {
        WirePath::new(text).unwrap()
    }

    #[test]
    fn repositories_are_left_out_at_any_depth_and_similar_names_are_not() {
        for ignore in [Ignore::default(), Ignore::parse(b"!.git\n!.cortex\n")] {
            assert!(ignore.ignores_name(None, PRIVATE_NAME));
            let ignores = |text: &str| ignore.ignores(&path(text), false);
            for text in [".git", ".git/hooks/pre-commit", "a/.git", "a/b/.git/config"] {
                assert!(ignores(text), "{text}");
            }
            for text in ["a", "a.git", ".gitignore", "a/.cortex", "a/.github"] {
                assert!(!ignores(text), "{text}");
            }
        }
    }

    #[test]
    fn rules_are_those_of_gitignore() {
        let rules = b"# comment\n\n*.o\n/top\nbuild/\ndocs/**/*.pdf\n!keep.o\n*.log\r\n\\#name\n";
        let ignore = Ignore::parse(rules);
        assert!(ignore.refused().is_empty());
        for (text, is_dir, left_out) in [
            ("a.o", false, true),
            ("d/e/a.o", false, true),
            ("keep.o", false, false),
            ("d/keep.o", false, false),
            ("top", false, true),
            ("top/x", false, true),
            ("d/top", false, false),
            ("build", true, true),
            ("build", false, false),
            ("d/build", true, true),
            ("d/build/x/y", false, true),
            ("docs/a/b/c.pdf", false, true),
            ("docs/c.pdf", false, true),
            ("c.pdf", false, false),
            ("x.log", false, true),
            ("#name", false, true),
            ("comment", false, false),
            (".cortexignore", false, false),
        ] {
            assert_eq!(ignore.ignores(&path(text), is_dir), left_out, "{text}");
        }
        let everything = Ignore::parse(b"*\n");
        assert!(!everything.ignores(&path(".cortexignore"), false));
        assert!(everything.ignores(&path("a/.cortexignore"), false));
        let name = WirePath::new(b"not \xff utf-8.o".to_vec()).unwrap();
        assert!(ignore.ignores(&name, false));
        assert!(ignore.why(&path("build/x"), false).unwrap().contains("build/"));
    }

    #[test]
    fn some_rules_let_what_they_leave_out_be_removed_with_its_directory() {
        let ignore = Ignore::parse(b"(?d)*.o\n*.log\n(?d)cache/\n(?d).git\n(?d)*.keep\n*.keep\n");
        assert!(ignore.refused().is_empty());
        for (text, is_dir, removable) in [
            ("a.o", false, true),
            ("d/a.o", false, true),
            ("a.log", false, false),
            ("d/cache", true, true),
            ("cache", false, false),
            (".git", true, false),
            ("x.keep", false, false),
            ("a.c", false, false),
            (".cortexignore", false, false),
        ] {
            assert_eq!(ignore.lets_remove(&path(text), is_dir), removable, "{text}");
        }
        assert!(ignore.ignores(&path("a.o"), false) && ignore.ignores(&path("d/cache/x"), false));
    }

    #[test]
    fn hostile_rules_are_bounded_and_told() {
        let long = vec![b'a'; 100_000];
        let many = b"x\n".repeat(5000);
        for text in [&long[..], &many, b"\xff\xfe\n", &[b'['; 600], b"{a,{b,{c,\n"] {
            let ignore = Ignore::parse(text);
            assert!(!ignore.refused().is_empty() || ignore.version().is_some());
            assert!(ignore.refused().len() <= 8);
            assert!(!ignore.ignores(&path("innocent"), false));
        }
        assert!(!Ignore::parse(&long).refused().is_empty());
        assert!(!Ignore::parse(&many).refused().is_empty());
    }
}
