//! Operations on a real directory, with hostile names and somebody who changes things meanwhile.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cortex_shared::ids::WorkspaceId;
use rustix::fs::{CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};

use super::*;
use crate::sync::WorkspaceConfig;

/// Somebody who asks, and what came.
#[derive(Default)]
struct Asking {
    pieces: VecDeque<Piece>,
    entries: Vec<Info>,
    frames: usize,
    data: Vec<u8>,
    taken: u64,
    /// Done once, when the last piece is taken.
    meanwhile: Option<Box<dyn FnOnce()>>,
    gone: bool,
}

impl Asking {
    fn to_write(content: &[u8]) -> Self {
        let pieces = content.chunks(1000).map(|piece| Piece::Data(Bytes::copy_from_slice(piece)));
        let hash = *blake3::hash(content).as_bytes();
        let end = Piece::End { bytes: content.len() as u64, hash };
        Self { pieces: pieces.chain([end]).collect(), ..Self::default() }
    }
}

impl Caller for Asking {
    fn entries(&mut self, entries: Vec<Info>) -> Result<(), FileError> {
        self.entries.extend(entries);
        self.frames += 1;
        Ok(())
    }

    fn data(&mut self, data: Bytes) -> Result<(), FileError> {
        self.data.extend_from_slice(&data);
        if let Some(meanwhile) = self.meanwhile.take() {
            meanwhile();
        }
        Ok(())
    }

    fn taken(&mut self, bytes: u64) -> Result<(), FileError> {
        self.taken += bytes;
        Ok(())
    }

    fn next(&mut self) -> Result<Piece, FileError> {
        let piece = self.pieces.pop_front().ok_or(FileError::Gone)?;
        if matches!(piece, Piece::End { .. })
            && let Some(meanwhile) = self.meanwhile.take()
        {
            meanwhile();
        }
        Ok(piece)
    }

    fn is_there(&self) -> Result<(), FileError> {
        if self.gone { Err(FileError::Gone) } else { Ok(()) }
    }
}

/// A workspace with something beside it that nobody may reach.
struct Yard {
    scratch: tempfile::TempDir,
    place: Place,
}

impl Yard {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("root")).unwrap();
        fs::create_dir(scratch.path().join("outside")).unwrap();
        fs::write(scratch.path().join("outside/secret"), b"secret").unwrap();
        let config = WorkspaceConfig {
            id: WorkspaceId::new(),
            name: "w".to_owned(),
            root: scratch.path().join("root"),
            state_dir: scratch.path().join("state"),
            roots: Default::default(),
            library: None,
        };
        let place = Place::open(config, &[scratch.path().join("state")]).unwrap();
        Self { scratch, place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join("root").join(name)
    }

    fn outside(&self, name: &str) -> PathBuf {
        self.scratch.path().join("outside").join(name)
    }

    fn ask(&self, path: &str, action: Action, caller: &mut Asking) -> Result<Done, FileError> {
        let path = (!path.is_empty()).then(|| WirePath::new(path).unwrap());
        perform(&self.place, &Request { path, action }, caller)
    }

    fn write(&self, path: &str, content: &[u8], expected: Expected) -> Result<Done, FileError> {
        let action = Action::Write { expected, mode: None };
        self.ask(path, action, &mut Asking::to_write(content))
    }

    fn read(&self, path: &str, offset: u64, length: u64) -> Result<Vec<u8>, FileError> {
        let mut asking = Asking::default();
        let done = self.ask(path, Action::Read { offset, length }, &mut asking)?;
        let content = done.content.unwrap();
        assert_eq!(content, (asking.data.len() as u64, *blake3::hash(&asking.data).as_bytes()));
        assert!(!done.changed);
        Ok(asking.data)
    }

    fn list(&self, path: &str, after: &[u8], limit: u64) -> (Vec<Vec<u8>>, bool) {
        let mut asking = Asking::default();
        let action = Action::List { after: after.to_vec(), limit };
        let done = self.ask(path, action, &mut asking).unwrap();
        (asking.entries.into_iter().map(|entry| entry.name).collect(), done.more)
    }

    /// What lies in the place where files are put together.
    fn drafts(&self) -> usize {
        self.place.incoming().unwrap().dir().names().unwrap().len()
    }
}

const REMOVE: Action = Action::Remove { recursive: true };
const READ: Action = Action::Read { offset: 0, length: u64::MAX };

#[test]
fn what_is_written_is_read_as_it_was_with_its_hash_and_mode() {
    let yard = Yard::new();
    let content: Vec<u8> = (0..600_000_u32).map(|n| (n % 251) as u8).collect();
    let hash = *blake3::hash(&content).as_bytes();
    let done = yard.write("f", &content, Expected::Anything).unwrap();
    assert_eq!(done.content, Some((600_000, hash)));
    assert_eq!(done.info.unwrap().hash, Some(hash));
    assert_eq!(yard.read("f", 0, u64::MAX).unwrap(), content);
    assert_eq!(yard.read("f", 599_990, 100).unwrap(), content[599_990..]);
    assert_eq!(yard.read("f", 5, 10).unwrap(), content[5..15]);
    assert!(yard.read("f", u64::MAX - 5, 100).unwrap().is_empty());
    fs::set_permissions(yard.path("f"), fs::Permissions::from_mode(0o640)).unwrap();
    let stat = yard.ask("f", Action::Stat { hash: false }, &mut Asking::default()).unwrap();
    let info = stat.info.unwrap();
    assert_eq!((info.hash, info.size, info.mode), (Some(hash), 600_000, 0o640));
    // The bits of the file that is replaced stay; others are taken if they are asked for.
    yard.write("f", b"new", Expected::Content(hash)).unwrap();
    assert_eq!(fs::metadata(yard.path("f")).unwrap().mode() & 0o7777, 0o640);
    let action = Action::Write { expected: Expected::Anything, mode: Some(0o755) };
    yard.ask("f", action, &mut Asking::to_write(b"run")).unwrap();
    assert_eq!(fs::metadata(yard.path("f")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::read(yard.path("f")).unwrap(), b"run");
    assert_eq!(yard.drafts(), 0);
}

#[test]
fn no_name_leads_out_of_the_workspace_or_to_what_is_no_file() {
    let yard = Yard::new();
    symlink(yard.outside(""), yard.path("dir")).unwrap();
    symlink(yard.outside("secret"), yard.path("link")).unwrap();
    symlink("/proc/self/root", yard.path("magic")).unwrap();
    fs::create_dir(yard.path("real")).unwrap();
    symlink("..", yard.path("real/up")).unwrap();
    mknodat(CWD, yard.path("pipe"), FileType::Fifo, Mode::from(0o666), 0).unwrap();
    // Positive control: without this room's care, each of them leads there.
    assert_eq!(fs::read(yard.path("dir/secret")).unwrap(), b"secret");
    assert_eq!(fs::read(yard.path("link")).unwrap(), b"secret");
    let write = || Action::Write { expected: Expected::Anything, mode: None };
    for path in ["dir/secret", "link", "magic/etc/passwd", "real/up/f", "pipe", "real/up/real/f"] {
        let read = yard.ask(path, READ, &mut Asking::default());
        assert!(matches!(read, Err(FileError::WrongKind { .. })), "{path}: {read:?}");
        let written = yard.ask(path, write(), &mut Asking::to_write(b"x"));
        assert!(matches!(written, Err(FileError::WrongKind { .. })), "{path}: {written:?}");
    }
    for path in ["dir/new", "magic/tmp/new", "real/up/new"] {
        for action in [write(), Action::MakeDirectory { parents: true }, REMOVE] {
            let result = yard.ask(path, action, &mut Asking::to_write(b"x"));
            assert!(matches!(result, Err(FileError::WrongKind { .. })), "{path}: {result:?}");
        }
    }
    // Links themselves are listed, looked at and removed.
    let stat = yard.ask("link", Action::Stat { hash: true }, &mut Asking::default()).unwrap();
    let info = stat.info.unwrap();
    assert_eq!((info.kind, info.hash), (FileKind::Link, None));
    assert_eq!(info.target, yard.outside("secret").as_os_str().as_bytes());
    for path in ["dir", "link", "magic", "pipe"] {
        yard.ask(path, Action::Remove { recursive: true }, &mut Asking::default()).unwrap();
    }
    assert_eq!(fs::read(yard.outside("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(yard.outside("")).unwrap().count(), 1);
    for path in
        ["../outside/secret", "/etc/passwd", "a/../../x", "./a", "a//b", ".cortex/x", "a\0b"]
    {
        assert!(WirePath::new(path).is_err(), "{path}");
    }
}

#[test]
fn a_directory_that_keeps_changing_into_a_link_never_leads_out() {
    let yard = Yard::new();
    fs::create_dir(yard.path("d")).unwrap();
    symlink(yard.outside(""), yard.path("l")).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let swapping = {
        let (over, d, l) = (Arc::clone(&over), yard.path("d"), yard.path("l"));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                renameat_with(CWD, &d, CWD, &l, RenameFlags::EXCHANGE).unwrap();
            }
        })
    };
    let (mut inside, mut refused) = (0, 0);
    let end = Instant::now() + Duration::from_secs(60);
    // Who swaps may not get to run for a while: until both have been met.
    while inside + refused < 400 || inside == 0 || refused == 0 {
        assert!(Instant::now() < end, "{inside} {refused}");
        match yard.write("d/f", b"x", Expected::Anything) {
            Ok(_) => inside += 1,
            Err(FileError::WrongKind { .. } | FileError::NotFound { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(!matches!(yard.read("d/secret", 0, 9), Ok(content) if !content.is_empty()));
        yard.ask("d/secret", REMOVE, &mut Asking::default()).unwrap_err();
        let _made =
            yard.ask("d/x/y", Action::MakeDirectory { parents: true }, &mut Asking::default());
        let _gone = yard.ask("d/x", REMOVE, &mut Asking::default());
    }
    over.store(true, Ordering::Relaxed);
    swapping.join().unwrap();
    let left: Vec<_> =
        fs::read_dir(yard.outside("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["secret"]);
    assert_eq!(fs::read(yard.outside("secret")).unwrap(), b"secret");
}

#[test]
fn a_tree_whose_directories_change_into_links_is_removed_and_nothing_else() {
    let yard = Yard::new();
    let over = Arc::new(AtomicBool::new(false));
    for round in 0..30 {
        for n in 0..20 {
            fs::create_dir_all(yard.path(&format!("t/d{n}/e"))).unwrap();
            fs::write(yard.path(&format!("t/d{n}/e/f")), b"x").unwrap();
        }
        symlink(yard.outside(""), yard.path("t/l")).unwrap();
        let swapping = {
            let (over, t) = (Arc::clone(&over), yard.path("t"));
            std::thread::spawn(move || {
                for n in 0..20 {
                    let d = t.join(format!("d{n}"));
                    renameat_with(CWD, &d, CWD, t.join("l"), RenameFlags::EXCHANGE).ok();
                }
                over.store(round == 29, Ordering::Relaxed);
            })
        };
        // It may meet what has just changed; another attempt meets no more of it.
        while yard.ask("t", REMOVE, &mut Asking::default()).is_err() && yard.path("t").exists() {}
        swapping.join().unwrap();
        let _rest = yard.ask("t", REMOVE, &mut Asking::default());
        assert!(!yard.path("t").exists());
    }
    assert_eq!(fs::read(yard.outside("secret")).unwrap(), b"secret");
}

#[test]
fn a_write_that_is_cut_off_or_damaged_leaves_the_old_file_and_nothing_else() {
    let yard = Yard::new();
    fs::write(yard.path("f"), b"old").unwrap();
    let action = || Action::Write { expected: Expected::Anything, mode: None };
    let mut cut = Asking::to_write(b"new content");
    cut.pieces.pop_back();
    assert!(matches!(yard.ask("f", action(), &mut cut), Err(FileError::Gone)));
    let mut damaged = Asking::to_write(b"new content");
    damaged.pieces[0] = Piece::Data(Bytes::from_static(b"now content"));
    assert!(matches!(yard.ask("f", action(), &mut damaged), Err(FileError::Damaged)));
    let mut gone = Asking { gone: true, ..Asking::to_write(b"new content") };
    assert!(matches!(yard.ask("f", action(), &mut gone), Err(FileError::Gone)));
    assert_eq!(fs::read(yard.path("f")).unwrap(), b"old");
    assert_eq!(fs::read_dir(yard.path("")).unwrap().count(), 1);
    assert_eq!(yard.drafts(), 0);
}

#[test]
fn a_file_is_replaced_only_if_it_is_what_was_expected() {
    let yard = Yard::new();
    let hash = |content: &[u8]| *blake3::hash(content).as_bytes();
    let wrong = yard.write("f", b"x", Expected::Content(hash(b"old")));
    assert!(matches!(wrong, Err(FileError::Changed { now: None, .. })));
    yard.write("f", b"old", Expected::Absent).unwrap();
    assert!(matches!(yard.write("f", b"x", Expected::Absent), Err(FileError::Exists { .. })));
    let wrong = yard.write("f", b"x", Expected::Content(hash(b"older")));
    assert!(matches!(wrong, Err(FileError::Changed { now: Some(now), .. }) if now == hash(b"old")));
    yard.write("f", b"new", Expected::Content(hash(b"old"))).unwrap();
    // Somebody was faster, while the content was on its way.
    type Meanwhile = fn(&std::path::Path);
    let others: [(Meanwhile, &[u8]); 3] = [
        (|path| fs::write(path, b"theirs").unwrap(), b"theirs"),
        (
            |path| {
                fs::write(path.with_extension("n"), b"their own").unwrap();
                fs::rename(path.with_extension("n"), path).unwrap();
            },
            b"their own",
        ),
        (|path| fs::remove_file(path).unwrap(), b""),
    ];
    for (other, left) in others {
        fs::write(yard.path("f"), b"new").unwrap();
        let path = yard.path("f");
        let mut caller = Asking::to_write(b"mine");
        caller.meanwhile = Some(Box::new(move || other(&path)));
        let action = Action::Write { expected: Expected::Content(hash(b"new")), mode: None };
        let raced = yard.ask("f", action, &mut caller);
        assert!(matches!(raced, Err(FileError::Changed { .. })), "{raced:?}");
        assert_eq!(fs::read(yard.path("f")).unwrap_or_default(), left);
    }
    let path = yard.path("g");
    let mut caller = Asking::to_write(b"mine");
    caller.meanwhile = Some(Box::new(move || fs::write(path, b"theirs").unwrap()));
    let action = Action::Write { expected: Expected::Absent, mode: None };
    assert!(matches!(yard.ask("g", action, &mut caller), Err(FileError::Exists { .. })));
    assert_eq!(fs::read(yard.path("g")).unwrap(), b"theirs");
    assert_eq!(yard.drafts(), 0);
}

#[test]
fn of_many_writers_who_expect_the_same_file_exactly_one_succeeds() {
    let yard = Yard::new();
    let expected = Expected::Content(*blake3::hash(b"base").as_bytes());
    // Often: three of them have to meet within microseconds for one to take what another has put back.
    for _ in 0..50 {
        fs::write(yard.path("f"), b"base").unwrap();
        let won: Vec<usize> = std::thread::scope(|scope| {
            let writing: Vec<_> = (0..8)
                .map(|n| {
                    let (yard, content) = (&yard, format!("by {n}"));
                    scope.spawn(move || yard.write("f", content.as_bytes(), expected).is_ok())
                })
                .collect();
            let done = writing.into_iter().enumerate();
            done.filter_map(|(n, writing)| writing.join().unwrap().then_some(n)).collect()
        });
        assert_eq!(won.len(), 1, "{won:?}");
        assert_eq!(fs::read_to_string(yard.path("f")).unwrap(), format!("by {}", won[0]));
        assert_eq!(yard.drafts(), 0);
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_said_to_have() {
    let yard = Yard::new();
    fs::write(yard.path("f"), vec![b'a'; 600_000]).unwrap();
    let path = yard.path("f");
    let meanwhile: Box<dyn FnOnce()> = Box::new(move || fs::write(path, b"short").unwrap());
    let mut caller = Asking { meanwhile: Some(meanwhile), ..Asking::default() };
    assert!(yard.ask("f", READ, &mut caller).unwrap().changed);
}

#[test]
fn large_directories_are_listed_in_order_in_pages_and_in_pieces() {
    let yard = Yard::new();
    fs::create_dir(yard.path("d")).unwrap();
    for n in 0..3000 {
        fs::write(yard.path(&format!("d/{n:05}")), b"").unwrap();
    }
    let mut asking = Asking::default();
    yard.ask("d", Action::List { after: vec![], limit: 0 }, &mut asking).unwrap();
    assert_eq!(asking.entries.len(), 3000);
    assert!(asking.entries.is_sorted_by(|a, b| a.name < b.name));
    assert!(asking.frames > 3, "{}", asking.frames);
    let (mut after, mut all) = (Vec::new(), Vec::new());
    loop {
        let (page, more) = yard.list("d", &after, 700);
        after = page.last().unwrap().clone();
        all.extend(page);
        if !more {
            break;
        }
    }
    assert_eq!(all, asking.entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>());
    // Of what is no directory, itself; of the workspace, its own.
    assert_eq!(yard.list("d/00007", b"", 0).0, [b"00007"]);
    assert_eq!(yard.list("", b"", 0).0, [b"d"]);
    let missing = yard.ask("x", Action::List { after: vec![], limit: 0 }, &mut Asking::default());
    assert!(matches!(missing, Err(FileError::NotFound { .. })));
}

#[test]
fn names_are_bytes() {
    let yard = Yard::new();
    let path = WirePath::new(b"a\xff\n".to_vec()).unwrap();
    let action = Action::Write { expected: Expected::Anything, mode: None };
    let request = Request { path: Some(path), action };
    perform(&yard.place, &request, &mut Asking::to_write(b"x")).unwrap();
    assert_eq!(yard.list("", b"", 0).0, [b"a\xff\n".to_vec()]);
}

#[test]
fn trees_are_removed_only_if_that_is_asked_for_and_counted() {
    let yard = Yard::new();
    let make = Action::MakeDirectory { parents: true };
    assert_eq!(yard.ask("a/b/c", make.clone(), &mut Asking::default()).unwrap().count, 3);
    assert_eq!(yard.ask("a/b/c", make.clone(), &mut Asking::default()).unwrap().count, 0);
    let plain = Action::MakeDirectory { parents: false };
    let exists = yard.ask("a/b", plain.clone(), &mut Asking::default());
    assert!(matches!(exists, Err(FileError::Exists { .. })));
    let missing = yard.ask("x/y", plain, &mut Asking::default());
    assert!(matches!(missing, Err(FileError::NotFound { .. })));
    fs::write(yard.path("a/b/f"), b"x").unwrap();
    assert!(matches!(
        yard.ask("a/b/f/d", make, &mut Asking::default()),
        Err(FileError::WrongKind { .. })
    ));
    let plain = yard.ask("a", Action::Remove { recursive: false }, &mut Asking::default());
    assert!(matches!(plain, Err(FileError::IsDirectory { .. })));
    let gone = yard.ask("a", REMOVE, &mut Asking { gone: true, ..Asking::default() });
    assert!(matches!(gone, Err(FileError::Gone)));
    assert_eq!(yard.ask("a", REMOVE, &mut Asking::default()).unwrap().count, 4);
    assert!(matches!(
        yard.ask("a", REMOVE, &mut Asking::default()),
        Err(FileError::NotFound { .. })
    ));
    for action in [REMOVE, Action::MakeDirectory { parents: true }] {
        let itself = yard.ask("", action, &mut Asking::default());
        assert!(matches!(itself, Err(FileError::TheWorkspaceItself)));
    }
    let mut deep = yard.path("deep");
    for _ in 0..120 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).unwrap();
    let refused = yard.ask("deep", REMOVE, &mut Asking::default());
    assert!(matches!(refused, Err(FileError::TooMuch { .. })), "{refused:?}");
}

#[test]
fn names_that_programs_obey_are_left_alone_whoever_asks() {
    let yard = Yard::new();
    fs::create_dir_all(yard.path(".git/hooks")).unwrap();
    fs::write(yard.path(".git/config"), b"[core]").unwrap();
    for path in [".git/hooks/pre-commit", ".git/config", ".git", ".envrc", "sub/.git/hooks/x"] {
        for action in [
            Action::Write { expected: Expected::Anything, mode: None },
            Action::MakeDirectory { parents: true },
            REMOVE,
        ] {
            let refused = yard.ask(path, action, &mut Asking::to_write(b"x"));
            assert!(matches!(refused, Err(FileError::Protected { .. })), "{path}: {refused:?}");
        }
    }
    assert_eq!(yard.read(".git/config", 0, 99).unwrap(), b"[core]");
    assert_eq!(fs::read_dir(yard.path("")).unwrap().count(), 1);
}

#[test]
fn a_workspace_that_would_show_what_must_stay_hidden_is_no_place() {
    let scratch = tempfile::tempdir().unwrap();
    let config = |root: PathBuf| WorkspaceConfig {
        id: WorkspaceId::new(),
        name: "w".to_owned(),
        root,
        state_dir: scratch.path().join("state"),
        roots: Default::default(),
        library: None,
    };
    fs::create_dir_all(scratch.path().join("state/inner")).unwrap();
    let forbidden = [scratch.path().join("state")];
    for root in ["/", "/etc", "/usr", "/proc/self"] {
        let refused = Place::open(config(root.into()), &forbidden);
        assert!(matches!(refused, Err(FileError::Unusable { .. })), "{root}");
    }
    for root in [scratch.path().to_owned(), scratch.path().join("state/inner")] {
        assert!(Place::open(config(root), &forbidden).is_err());
    }
}
