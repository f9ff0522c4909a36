//! Nothing is lost, and nobody waits for somebody else's trouble.

use std::sync::atomic::{AtomicBool, Ordering};

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
async fn a_file_that_is_written_all_the_time_holds_up_neither_flush_nor_acknowledgement() {
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
