//! Nothing is lost, and nobody waits for somebody else's trouble.

use std::sync::atomic::{AtomicBool, Ordering};

use cortex_shared::entry::{Digest, Entry};

use super::super::problem::Code;
use super::*;

/// Writes to a file all the time until it is dropped.
struct Writer(Option<std::thread::JoinHandle<()>>, std::sync::Arc<AtomicBool>);

impl Writer {
    fn start(path: PathBuf) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for number in 0_u64.. {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                fs::write(&path, number.to_string()).unwrap();
                // The pace of the writer, not a wait for anything.
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self(Some(thread), stop)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
        self.0.take().unwrap().join().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t13_a_file_that_is_written_all_the_time_holds_up_neither_flush_nor_acknowledgement() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    settle(&[&a, &b]).await;
    let writer = Writer::start(b.path("log"));
    let begun = std::time::Instant::now();
    for number in 0..3 {
        a.write(&format!("by a {number}"), "x");
        a.flush().await;
        let seq = *mesh.hub.subscribe().borrow();
        b.handle().head_moved(seq);
        b.until(|status| status.applied_seq >= seq).await;
        b.write(&format!("by b {number}"), "x");
        b.flush().await;
        let path = format!("by b {number}");
        let path = cortex_shared::wire_path::WirePath::new(path).unwrap();
        assert!(mesh.hub.tree().contains_key(&path), "flushed");
    }
    drop(writer);
    // Not a measurement: waiting for moments without a change took more than 40 s.
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    settle(&[&a, &b]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_to_a_file_after_it_was_replaced_or_deleted_is_not_lost() {
    use std::io::Write as _;
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for name in ["d/replaced.txt", "d/deleted.txt", "gone/deleted.txt", "d/quiet.txt"] {
        a.write(name, "old");
    }
    settle(&[&a, &b]).await;
    let open = |name: &str| fs::OpenOptions::new().append(true).open(b.path(name)).unwrap();
    let names = ["d/replaced.txt", "d/deleted.txt", "gone/deleted.txt"];
    let mut files = names.map(open);
    a.write("d/replaced.txt", "new");
    a.write("d/quiet.txt", "new");
    fs::remove_file(a.path("d/deleted.txt")).unwrap();
    fs::remove_dir_all(a.path("gone")).unwrap();
    a.flush().await;
    b.flush().await;
    assert_eq!(b.names(), ["d", "d/quiet.txt", "d/replaced.txt"]);
    for file in &mut files {
        file.write_all(b" and late").unwrap();
    }
    b.flush().await;
    settle(&[&a, &b]).await;
    let names = a.names();
    assert_eq!(names.len(), 6, "{names:?}");
    let copy = names.iter().find(|name| name.starts_with("d/replaced.conflict-")).unwrap();
    for name in [copy, "d/deleted.txt", "deleted.txt"] {
        assert_eq!(a.read(name), "old and late", "{name}");
    }
    assert_eq!(a.read("d/replaced.txt"), "new");
    // It is a file like any other then, also for those who go on writing.
    files[1].write_all(b"r").unwrap();
    settle(&[&b, &a]).await;
    assert_eq!(a.read("d/deleted.txt"), "old and later");
    let status = b.status();
    assert!(status.problems.is_empty(), "{:?}", status.problems);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_hub_takes_deletions_and_is_not_called_unreachable() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    for name in ["deleted", "edited", "moved"] {
        a.write(name, format!("content of {name}"));
    }
    a.flush().await;
    mesh.hub.set_full(true);
    a.write("new", "no room for this");
    a.write("edited", "nor for this");
    fs::rename(a.path("moved"), a.path("there")).unwrap();
    fs::remove_file(a.path("deleted")).unwrap();
    a.flush().await;
    let names = || mesh.hub.tree().keys().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(names(), ["edited", "there"]);
    let status = a.status();
    assert_eq!(status.state, SyncState::Idle);
    let problems: Vec<_> = status
        .problems
        .iter()
        .map(|problem| (problem.path.as_ref().unwrap().to_string(), problem.code.as_str()))
        .collect();
    assert_eq!(problems, [("edited".into(), "hub_full"), ("new".into(), "hub_full")]);
    assert!(status.problems[0].message.contains("disk is full"), "{status:?}");
    mesh.hub.set_full(false);
    a.flush().await;
    assert_eq!(names(), ["edited", "new", "there"]);
    assert!(a.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_for_which_the_hub_has_no_room_is_told_and_holds_up_nothing() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    mesh.hub.set_full(true);
    a.write("large", noise(1, 12 << 20));
    a.flush().await;
    let told = |status: &SyncStatus| {
        let problem = status.problems.first().map(|problem| problem.code);
        status.state == SyncState::Idle && problem == Some(Code::HubFull)
    };
    a.until(told).await;
    let [_, received, _] = mesh.hub.traffic();
    fs::create_dir(a.path("needs no content")).unwrap();
    a.until(|status| told(status) && mesh.hub.tree().len() == 1).await;
    assert_eq!(mesh.hub.traffic()[1], received);
    mesh.hub.set_full(false);
    a.flush().await;
    assert_eq!(mesh.hub.tree().len(), 2);
    assert!(a.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_breaks_after_each_pack_gets_to_its_end() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    // Three packs of small files, and a large one of several.
    for number in 0..100 {
        a.write(&format!("small {number}"), noise(number, 100_000));
    }
    a.write("large", noise(1000, 12 << 20));
    a.flush().await;
    mesh.hub.break_answers_after(1);
    let b = mesh.node("b");
    b.until(|status| status.state == SyncState::Idle && status.entries == 101).await;
    assert_eq!(a.tree(), b.tree());
    // No pack more often than the line broke: 10 MB and 12 MiB in packs of 4 MiB.
    let sent = mesh.hub.traffic()[2];
    assert!(sent <= 40, "{sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_whose_chunks_do_not_make_up_its_content_takes_no_place() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    let content = noise(5, 20 << 20);
    a.write("true", &content);
    a.flush().await;
    let path = cortex_shared::wire_path::WirePath::new("true").unwrap();
    let Some(Entry::File(mut file)) = mesh.hub.tree().remove(&path) else { panic!("a file") };
    // All its chunks are at the hub, and each is what it says.
    file.content = Digest::of(b"something else");
    mesh.hub.put("lie", Some(Entry::File(file)));
    let b = mesh.node("b");
    let told = |status: &SyncStatus| status.problems.iter().any(|p| p.code == Code::StageFailed);
    b.until(|status| told(status) && status.state == SyncState::Idle).await;
    assert_eq!(b.names(), ["true"]);
    assert!(fs::read(b.path("true")).unwrap() == content);
}
