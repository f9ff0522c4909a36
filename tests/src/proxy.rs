//! A TCP proxy that does to a connection what networks do: cuts it, lets it stall, delays it, narrows it.
//!
//! Each connection has a thread for each direction; all of them obey the latest [`Fault`]. Ends with
//! its value: the listener is closed and the connections are cut.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What happens to bytes under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// They wait, and so does everything behind them, as on a line that went dead without a word. New
    /// connections are taken and stall likewise.
    Stall,
    /// New connections are refused, as by a host that is not there.
    Refuse,
    /// Each piece is late by this much.
    Delay(Duration),
    /// So many bytes a second in each direction of each connection.
    Bandwidth(u32),
}

/// A direction of all connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towards {
    /// To whoever dialled.
    Client,
    /// To what was dialled.
    Server,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    fault: Fault,
    /// Where new connections lead.
    target: SocketAddr,
    connections: Vec<TcpStream>,
    /// After so many more bytes in this direction everything is cut.
    cut_after: Option<(Towards, usize)>,
    over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn cut(&mut self) {
        for connection in self.connections.drain(..) {
            // It may be gone already.
            connection.shutdown(Shutdown::Both).ok();
        }
    }
}

/// See the module.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// A proxy on loopback before `target`.
    ///
    /// # Panics
    /// If there is no free port.
    #[must_use]
    pub fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let address = listener.local_addr().expect("it is bound");
        let state = State {
            fault: Fault::None,
            target,
            connections: Vec::new(),
            cut_after: None,
            over: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, &accepting));
        Self { address, shared }
    }

    /// Where to dial.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on.
    pub fn set(&self, fault: Fault) {
        self.shared.lock().fault = fault;
        self.shared.changed.notify_all();
    }

    /// Cuts all connections; new ones are taken.
    pub fn cut(&self) {
        self.shared.lock().cut();
        self.shared.changed.notify_all();
    }

    /// Cuts all connections once so many more bytes have gone in one direction: in the middle of a frame,
    /// as likely as not.
    pub fn cut_after(&self, towards: Towards, bytes: usize) {
        self.shared.lock().cut_after = Some((towards, bytes));
    }

    /// Whether what [`Proxy::cut_after`] asked for has happened.
    #[must_use]
    pub fn has_cut(&self) -> bool {
        self.shared.lock().cut_after.is_none()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.over = true;
        state.cut();
        drop(state);
        self.shared.changed.notify_all();
        // Wakes the one that accepts.
        TcpStream::connect(self.address).ok();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        let (fault, target, over) = {
            let state = shared.lock();
            (state.fault, state.target, state.over)
        };
        if over {
            return;
        }
        let Ok(client) = client else { continue };
        if fault == Fault::Refuse {
            continue;
        }
        let Ok(server) = TcpStream::connect(target) else { continue };
        for stream in [&client, &server] {
            stream.set_nodelay(true).ok();
        }
        let clone = |stream: &TcpStream| stream.try_clone().expect("there are descriptors");
        shared.lock().connections.extend([clone(&client), clone(&server)]);
        let (up, down) = ((clone(&client), clone(&server)), (server, client));
        for ((from, to), towards) in [(up, Towards::Server), (down, Towards::Client)] {
            let shared = Arc::clone(shared);
            thread::spawn(move || pump(from, to, towards, &shared));
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, towards: Towards, shared: &Shared) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let (fault, most) = {
                let mut state = shared.lock();
                while state.fault == Fault::Stall && !state.over {
                    state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                match state.cut_after {
                    Some((which, left)) if which == towards && left <= rest.len() => {
                        state.cut_after = None;
                        // What came before the cut still arrives.
                        to.write_all(&rest[..left]).ok();
                        state.cut();
                        return;
                    }
                    Some((which, left)) if which == towards => {
                        state.cut_after = Some((which, left - rest.len()));
                        (state.fault, rest.len())
                    }
                    _ => (state.fault, rest.len()),
                }
            };
            let piece = match fault {
                Fault::Bandwidth(rate) => most.min(rate as usize / 100 + 1),
                _ => most,
            };
            match fault {
                Fault::Delay(delay) => thread::sleep(delay),
                Fault::Bandwidth(_) => thread::sleep(Duration::from_millis(10)),
                Fault::None | Fault::Stall | Fault::Refuse => {}
            }
            if to.write_all(&rest[..piece]).is_err() {
                return;
            }
            rest = &rest[piece..];
        }
    }
    to.shutdown(Shutdown::Write).ok();
}
