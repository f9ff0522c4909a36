//! The file system of a sandbox: a small read-only root into which only what is listed here is
//! put. What is not listed does not exist inside.
//!
//! | inside | what it is |
//! |---|---|
//! | `/usr`, `/bin`, `/lib`, … | the host's, read-only |
//! | `/etc` | a list of harmless files of the host, and a few written here |
//! | `/proc` | private and read-only, with what it tells about the whole machine covered |
//! | `/dev` | six harmless nodes, private terminals and shared memory |
//! | `/tmp`, the home | private, of limited size, gone with the command |
//! | `/library` | the library of skills, read-only, once there is one |
//! | `/workspace` | the workspace, writable, without set-user-id bits and device nodes |
//!
//! Every mount costs time at the start and at the end of each command, so there is one only where
//! a copy of a small file or a flag of another mount would not do.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags};

use super::mounts::{Detached, make_directories, open_below};
use super::protect;
use super::spec::{
    Context as _, HOME_INSIDE, Identity, LIBRARY_INSIDE, LibrarySpec, Network, SetupError, Spec,
    Step, StrictSpec, WORKSPACE_INSIDE,
};
use super::syscalls::{self, MountAttributes, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY};
use super::workspace;

/// Directories of programs and libraries. On most systems all but `/usr` are links into it.
const SYSTEM: [&str; 8] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "libexec"];

/// Terminals of one command.
const MAX_TERMINALS: &str = "256";

/// Files and directories of `/etc` that programs need and that hold no secrets.
const ETC: [&str; 41] = [
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "alternatives",
    "ssl/certs",
    "ssl/openssl.cnf",
    "ssl/cert.pem",
    "ca-certificates",
    "ca-certificates.conf",
    "pki/tls/certs",
    "pki/tls/openssl.cnf",
    "pki/ca-trust/extracted",
    "crypto-policies",
    "localtime",
    "timezone",
    "profile",
    "bash.bashrc",
    "bashrc",
    "inputrc",
    "mime.types",
    "magic",
    "terminfo",
    "locale.alias",
    "locale.conf",
    "protocols",
    "services",
    "rpc",
    "os-release",
    "debian_version",
    "redhat-release",
    "alpine-release",
    "lsb-release",
    "fonts",
    "perl",
    "python3",
    "python3.11",
    "python3.12",
    "python3.13",
    "host.conf",
    "gai.conf",
    "xattr.conf",
];

const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Files of `/proc` that say too much about the whole machine, where its users may read them.
const PROC_COVERED: [&str; 15] = [
    "kcore",
    "keys",
    "key-users",
    "timer_list",
    "kallsyms",
    "kpagecount",
    "kpageflags",
    "kpagecgroup",
    "cmdline",
    "config.gz",
    "modules",
    "sched_debug",
    "latency_stats",
    "kmsg",
    "vmallocinfo",
];

/// Largest file of `/etc` that is copied; a larger one is mounted.
const MAX_COPIED_BYTES: u64 = 128 * 1024;

/// A file system that lacks nothing but the workspace. The host's is still there, too.
pub(super) struct Root {
    root: OwnedFd,
}

/// Builds all of the file system that does not depend on the command.
pub(super) fn prepare(strict: &StrictSpec) -> Result<Root, SetupError> {
    let step = Step::FileSystem;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .step(step, "make all mounts private")?;
    // Everything of the host is taken before the new root covers anything.
    let sources = Sources::take(strict)?;
    let root = Detached::new(
        "tmpfs",
        &[("size", "4m"), ("nr_inodes", "1k"), ("mode", "0755")],
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
    )?
    // Any directory would do in which no workspace can lie.
    .attach_over("/dev")?;

    sources.place(&root)?;
    write_etc(&root, strict)?;
    place_proc(&root)?;
    place_devices(&root)?;
    let size = strict.temporary_bytes;
    private_directory(size, "1777", MountAttrFlags::empty())?.attach(&root, "tmp")?;
    private_directory(size, "1777", MountAttrFlags::MOUNT_ATTR_NOEXEC)?.attach(&root, "dev/shm")?;
    private_directory(size, "0755", MountAttrFlags::empty())?.attach(&root, inside(HOME_INSIDE))?;
    make_directories(&root, "var")?;
    link(&root, "../tmp", "var/tmp")?;
    make_directories(&root, inside(WORKSPACE_INSIDE))?;
    Ok(Root { root })
}

impl Root {
    /// Adds the workspace and makes this the root of the caller's mount namespace. `mounted` is the
    /// workspace where the agent has mounted it; otherwise it is found by its path. Gives what is
    /// pinned in it.
    pub(super) fn complete(
        &self,
        mounted: Option<OwnedFd>,
        library: Option<OwnedFd>,
        spec: &Spec,
    ) -> Result<Vec<PathBuf>, SetupError> {
        if let Some(wanted) = &spec.library {
            self.add_library(library, wanted)?;
        }
        let workspace = match (mounted, &spec.workspace) {
            (Some(tree), _) => Detached::from_descriptor(tree)?,
            (None, Some(workspace)) => {
                Detached::from_descriptor(workspace::clone_tree(workspace)?)?
            }
            (None, None) => {
                private_directory(spec.limits.temporary_bytes, "0755", MountAttrFlags::empty())?
            }
        };
        workspace.attach(&self.root, inside(WORKSPACE_INSIDE))?;
        let pins = spec.workspace.as_ref().map_or(&[][..], |workspace| &workspace.pins);
        let pinned = protect::pin(&self.root, pins)?;
        syscalls::mount_set_attributes(
            self.root.as_fd(),
            MountAttributes { set: READ_ONLY, this_mount_only: true, ..MountAttributes::default() },
        )
        .step(Step::FileSystem, "make the root read-only")?;
        self.enter()?;
        Ok(pinned)
    }

    /// Adds the library, and a link to it at its path on the host, which the links in workspaces lead
    /// to. That path may be taken by something else inside; what is in the library is then found at its
    /// one place only.
    fn add_library(&self, tree: Option<OwnedFd>, wanted: &LibrarySpec) -> Result<(), SetupError> {
        let tree = match tree {
            Some(tree) => Some(tree),
            None => workspace::mount_library(&wanted.path)?,
        };
        let Some(tree) = tree else { return Ok(()) };
        Detached::from_descriptor(tree)?.attach(&self.root, inside(LIBRARY_INSIDE))?;
        // It is not there then; what is in the library is.
        self.link_library(&wanted.path).ok();
        Ok(())
    }

    /// Nothing on the way is followed: the root is the host's until the new one is entered.
    fn link_library(&self, path: &Path) -> rustix::io::Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut directory = rustix::fs::openat(&self.root, ".", flags, Mode::empty())?;
        for component in parent.components() {
            let Component::Normal(component) = component else { continue };
            match rustix::fs::mkdirat(&directory, component, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
            directory = rustix::fs::openat(&directory, component, flags, Mode::empty())?;
        }
        rustix::fs::symlinkat(LIBRARY_INSIDE, &directory, name)
    }

    /// Makes it the root, and lets go of the old one.
    fn enter(&self) -> Result<(), SetupError> {
        let change = || -> rustix::io::Result<()> {
            rustix::process::fchdir(&self.root)?;
            rustix::process::pivot_root(".", ".")?;
            // The old root now lies over the new one, at the same place.
            rustix::mount::unmount(".", UnmountFlags::DETACH)?;
            rustix::process::chdir("/")
        };
        change().step(Step::FileSystem, "enter the new root")
    }
}

/// What is taken of the host, and not yet placed.
struct Sources {
    trees: Vec<(String, Detached)>,
    links: Vec<(String, std::ffi::CString)>,
    copies: Vec<(String, Vec<u8>)>,
}

impl Sources {
    fn take(strict: &StrictSpec) -> Result<Self, SetupError> {
        let mut sources = Self { trees: Vec::new(), links: Vec::new(), copies: Vec::new() };
        let read_only = READ_ONLY | NO_SUID | NO_DEV;
        for name in SYSTEM {
            sources.take_one(name.to_owned(), read_only)?;
        }
        for name in ETC {
            let name = format!("etc/{name}");
            match small_file(&name) {
                Some(content) => sources.copies.push((name, content)),
                None => sources.take_one(name, read_only | NO_EXEC)?,
            }
        }
        for name in DEVICES {
            // Read-only would be no help: it does not concern writing to a device.
            sources.take_one(format!("dev/{name}"), NO_SUID | NO_EXEC)?;
        }
        for path in &strict.read_only {
            let name = path.to_str().and_then(|path| path.strip_prefix('/')).ok_or_else(|| {
                SetupError::new(Step::FileSystem, format!("{path:?} is no absolute path"))
            })?;
            if let Some(tree) = Detached::copy_of_exactly(path, read_only)? {
                sources.trees.push((name.to_owned(), tree));
            }
        }
        Ok(sources)
    }

    /// Takes a tree, or the link that stands there; nothing if there is neither.
    fn take_one(&mut self, name: String, attributes: u64) -> Result<(), SetupError> {
        let path = Path::new("/").join(&name);
        match rustix::fs::statat(rustix::fs::CWD, &path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Symlink => {
                let target = rustix::fs::readlink(&path, Vec::new())
                    .step(Step::FileSystem, format_args!("read the link {path:?}"))?;
                // It is resolved inside, so wherever it points, it can only point inside.
                self.links.push((name, target));
            }
            Ok(_) => {
                if let Some(tree) = Detached::copy_of(&path, attributes)? {
                    self.trees.push((name, tree));
                }
            }
            // Not there, or not for this user to see.
            Err(_) => {}
        }
        Ok(())
    }

    fn place(self, root: &OwnedFd) -> Result<(), SetupError> {
        for (name, target) in self.links {
            if let Some((parent, _)) = name.rsplit_once('/') {
                make_directories(root, parent)?;
            }
            link(root, &target, &name)?;
        }
        for (name, content) in self.copies {
            if let Some((parent, _)) = name.rsplit_once('/') {
                make_directories(root, parent)?;
            }
            write(root, &name, &content)?;
        }
        for (name, tree) in self.trees {
            tree.attach(root, &name)?;
        }
        Ok(())
    }
}

/// The content of a regular file below `/` that is small enough to be copied; `None` for anything
/// else, a link included.
fn small_file(name: &str) -> Option<Vec<u8>> {
    use std::io::Read as _;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let path = Path::new("/").join(name);
    let file = rustix::fs::openat(rustix::fs::CWD, path, flags, Mode::empty()).ok()?;
    let found = rustix::fs::fstat(&file).ok()?;
    let size = u64::try_from(found.st_size).ok()?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile || size > MAX_COPIED_BYTES {
        return None;
    }
    let mut content = Vec::with_capacity(usize::try_from(size).ok()? + 1);
    File::from(file).take(MAX_COPIED_BYTES).read_to_end(&mut content).ok()?;
    Some(content)
}

/// The name of an absolute path inside, relative to the root.
fn inside(path: &'static str) -> &'static str {
    path.trim_start_matches('/')
}

fn private_directory(bytes: u64, mode: &str, more: MountAttrFlags) -> Result<Detached, SetupError> {
    let size = bytes.to_string();
    // Small files take a page each, so the number of files follows from the size.
    let files = (bytes / 4096).clamp(1024, 1_000_000).to_string();
    Detached::new(
        "tmpfs",
        &[("size", &size), ("nr_inodes", &files), ("mode", mode)],
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | more,
    )
}

fn link(root: &OwnedFd, target: impl rustix::path::Arg, name: &str) -> Result<(), SetupError> {
    rustix::fs::symlinkat(target, root, name)
        .step(Step::FileSystem, format_args!("create the link /{name}"))
}

fn write(root: &OwnedFd, name: &str, content: &[u8]) -> Result<(), SetupError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(root, name, flags, Mode::from_raw_mode(0o644))
        .map_err(std::io::Error::from)
        .and_then(|file| File::from(file).write_all(content))
        .step(Step::FileSystem, format_args!("write /{name}"))
}

fn write_etc(root: &OwnedFd, strict: &StrictSpec) -> Result<(), SetupError> {
    make_directories(root, "etc")?;
    let Identity { uid, gid, .. } = strict.identity;
    let mut passwd = format!("cortex:x:{uid}:{gid}:cortex:{HOME_INSIDE}:/bin/bash\n");
    let mut group = format!("cortex:x:{gid}:\n");
    passwd.push_str("root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n");
    group.push_str("root:x:0:\n");
    // Everything that belongs to somebody else appears under the overflow ids.
    if uid != 65534 {
        passwd.push_str("nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n");
    }
    if gid != 65534 {
        group.push_str("nogroup:x:65534:\n");
    }
    write(root, "etc/passwd", passwd.as_bytes())?;
    write(root, "etc/group", group.as_bytes())?;
    write(root, "etc/hostname", b"cortex\n")?;
    write(root, "etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\n")?;
    let own_hosts = b"127.0.0.1 localhost cortex\n::1 localhost cortex\n".as_slice();
    match strict.network {
        Network::None => write(root, "etc/hosts", own_hosts),
        Network::Full => {
            let hosts = std::fs::read("/etc/hosts").unwrap_or_else(|_| own_hosts.to_vec());
            write(root, "etc/hosts", &hosts)?;
            let resolver = std::fs::read("/etc/resolv.conf").unwrap_or_default();
            write(root, "etc/resolv.conf", &resolver)
        }
    }
}

/// A private `/proc`. Nothing in it may be written: most of what can be concerns the whole machine,
/// and Landlock would deny the rest as well.
fn place_proc(root: &OwnedFd) -> Result<(), SetupError> {
    Detached::new(
        "proc",
        &[],
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?
    .attach(root, "proc")?;
    let null = open_below(root, "dev/null").step(Step::Proc, "open /dev/null")?;
    let proc = open_below(root, "proc").step(Step::Proc, "open /proc")?;
    for name in PROC_COVERED {
        // These belong to user 0 of the host, whom no command ever is, so the rights of others
        // decide; a file without any needs no cover.
        match rustix::fs::statat(&proc, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if found.st_mode & 0o007 == 0 => continue,
            Ok(_) => {}
            Err(rustix::io::Errno::NOENT) => continue,
            Err(error) => return Err(error).step(Step::Proc, format_args!("look at /proc/{name}")),
        }
        let attempt = format!("cover /proc/{name}");
        let place = open_below(&proc, name).step(Step::Proc, &attempt)?;
        Detached::copy_at(&null, Path::new("/dev/null"), READ_ONLY | NO_SUID | NO_EXEC)?
            .attach_at(&place, &attempt)?;
    }
    Ok(())
}

fn place_devices(root: &OwnedFd) -> Result<(), SetupError> {
    Detached::new(
        "devpts",
        // Of all terminals of the machine there is one number.
        &[("mode", "0620"), ("ptmxmode", "0666"), ("max", MAX_TERMINALS)],
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?
    .attach(root, "dev/pts")?;
    for (name, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        link(root, target, &format!("dev/{name}"))?;
    }
    Ok(())
}
