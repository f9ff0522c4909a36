//! Random edits on several nodes that come and go. Whatever happens, in the end all trees are equal,
//! and every content that nobody overwrote or deleted knowingly is still there.
//!
//! Prints its seed; `CORTEX_TEST_SEED` repeats one.

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::root_dir::{DirHandle, FileKind};

const NAMES: [&str; 4] = ["a", "b", "c.txt", "d"];
const STEPS: usize = 120;
const NODES: usize = 3;

struct World {
    random: StdRng,
    nodes: Vec<Node>,
    /// Where edits put what they displace, on the same file system.
    aside: DirHandle,
    next: u64,
    written: BTreeSet<String>,
    /// Contents that somebody removed who had them in front of him.
    removed: BTreeSet<String>,
}

impl World {
    fn path(&mut self) -> String {
        let depth = self.random.random_range(1..=3);
        let names: Vec<_> =
            (0..depth).map(|_| NAMES[self.random.random_range(0..NAMES.len())]).collect();
        names.join("/")
    }

    fn aside_path(&mut self, mesh: &Mesh) -> PathBuf {
        self.next += 1;
        mesh.folder.path().join("aside").join(self.next.to_string())
    }

    /// Notes what was taken away, and takes it away for good.
    fn note_removed(&mut self, path: &Path) {
        let meta = fs::symlink_metadata(path).unwrap();
        if meta.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                self.note_removed(&entry.unwrap().path());
            }
            fs::remove_dir(path).unwrap();
        } else {
            if meta.is_file() {
                self.removed.insert(fs::read_to_string(path).unwrap());
            }
            fs::remove_file(path).unwrap();
        }
    }

    /// Saves a new file as editors do, by a rename over the old one.
    fn save(&mut self, mesh: &Mesh, node: usize) {
        let name = self.path();
        let new = self.aside_path(mesh);
        let content = format!("content {}", self.next);
        fs::write(&new, &content).unwrap();
        let target = self.nodes[node].path(&name);
        let Some(parent) = target.parent() else { return };
        // A file in the way of a directory: another time.
        if fs::create_dir_all(parent).is_err() {
            return;
        }
        let Ok(directory) = DirHandle::open_ambient(parent) else { return };
        let leaf = target.file_name().unwrap().as_bytes();
        let temporary = new.file_name().unwrap().as_bytes();
        if self.aside.rename_new(temporary, &directory, leaf).is_ok() {
            self.written.insert(content);
        } else if self.aside.exchange(temporary, &directory, leaf).is_ok() {
            self.written.insert(content);
            self.note_removed(&new);
        }
    }

    fn remove(&mut self, mesh: &Mesh, node: usize) {
        let name = self.path();
        let target = self.nodes[node].path(&name);
        let aside = self.aside_path(mesh);
        if fs::rename(target, &aside).is_ok() {
            self.note_removed(&aside);
        }
    }

    fn move_within(&mut self, node: usize) {
        let (from, to) = (self.path(), self.path());
        let (from, to) = (self.nodes[node].path(&from), self.nodes[node].path(&to));
        let open = |path: &Path| DirHandle::open_ambient(path.parent().unwrap());
        if let (Ok(old), Ok(new)) = (open(&from), open(&to)) {
            let leaf = |path: &Path| path.file_name().unwrap().as_bytes().to_vec();
            old.rename_new(&leaf(&from), &new, &leaf(&to)).ok();
        }
    }

    fn toggle_executable(&mut self, node: usize) {
        let name = self.path();
        let path = self.nodes[node].path(&name);
        if let Ok(meta) = fs::symlink_metadata(&path)
            && meta.is_file()
        {
            let mode = meta.permissions().mode() ^ 0o111;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).ok();
        }
    }

    async fn step(&mut self, mesh: &Mesh) {
        let node = self.random.random_range(0..NODES);
        match self.random.random_range(0..100) {
            0..45 => self.save(mesh, node),
            45..57 => self.remove(mesh, node),
            57..67 => self.move_within(node),
            67..72 => self.toggle_executable(node),
            72..84 => {
                let online = self.random.random_bool(0.6);
                self.nodes[node].online.send_replace(online);
            }
            84..95 => {
                // An offline node answers at once that it is.
                self.nodes[node].handle().flush().await.ok();
            }
            _ => {
                self.nodes[node].stop().await;
                self.nodes[node].start();
            }
        }
    }

    fn contents(&self, node: usize) -> BTreeSet<String> {
        fn collect(directory: &DirHandle, contents: &mut BTreeSet<String>) {
            for name in directory.names().unwrap() {
                match directory.lstat(&name).unwrap().kind {
                    FileKind::Dir => collect(&directory.open_dir(&name).unwrap(), contents),
                    _ => {
                        let file = directory.open_file(&name).unwrap();
                        contents.insert(std::io::read_to_string(file.reader()).unwrap());
                    }
                }
            }
        }
        let mut contents = BTreeSet::new();
        let root = DirHandle::open_ambient(&self.nodes[node].config.root).unwrap();
        collect(&root, &mut contents);
        contents
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stderr)] // the seed of a failure
async fn random_edits_converge_and_lose_nothing() {
    let seed = match std::env::var("CORTEX_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::rng().random(),
    };
    eprintln!("CORTEX_TEST_SEED={seed}");
    let mesh = Mesh::new();
    let aside = mesh.folder.path().join("aside");
    fs::create_dir(&aside).unwrap();
    let mut world = World {
        random: StdRng::seed_from_u64(seed),
        nodes: (0..NODES).map(|number| mesh.node(&format!("n{number}"))).collect(),
        aside: DirHandle::open_ambient(&aside).unwrap(),
        next: 0,
        written: BTreeSet::new(),
        removed: BTreeSet::new(),
    };
    for node in &world.nodes {
        node.flush().await;
    }
    for _ in 0..STEPS {
        world.step(&mesh).await;
    }
    for node in &world.nodes {
        node.online.send_replace(true);
    }
    for round in 0.. {
        for node in &world.nodes {
            node.flush().await;
            if node.handle().confirm_deletions().unwrap() > 0 {
                node.flush().await;
            }
        }
        let trees: Vec<_> = world.nodes.iter().map(Node::tree).collect();
        if trees.windows(2).all(|pair| pair[0] == pair[1]) {
            break;
        }
        let problems = world.nodes[0].status().problems;
        assert!(round < 10, "no end: {trees:#?} {problems:#?}");
    }
    let present = world.contents(0);
    let expected: BTreeSet<_> = world.written.difference(&world.removed).cloned().collect();
    let lost: Vec<_> = expected.difference(&present).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
    let traffic = mesh.hub.traffic();
    for node in &world.nodes {
        node.flush().await;
    }
    assert_eq!(mesh.hub.traffic(), traffic, "a second run does nothing");
}
