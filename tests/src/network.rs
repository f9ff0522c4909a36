//! Who changes this machine's network, and who cannot bear that: a browser ends what it is asking for whenever
//! an interface comes or goes. The two wait for each other, so a test has one of them, and one only.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

struct Users {
    steady: usize,
    changes: usize,
    changing: bool,
}

static USERS: Mutex<Users> = Mutex::new(Users { steady: 0, changes: 0, changing: false });
static LEFT: Condvar = Condvar::new();

/// A test that failed spoils nothing here.
fn users() -> MutexGuard<'static, Users> {
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait(until: impl Fn(&Users) -> bool) -> MutexGuard<'static, Users> {
    LEFT.wait_while(users(), |users| !until(users)).unwrap_or_else(PoisonError::into_inner)
}

/// As long as it exists, no test changes the network.
pub struct SteadyNetwork(());

impl SteadyNetwork {
    /// Waits for those that change it, also for one that still waits itself.
    #[must_use]
    pub fn begin() -> Self {
        wait(|users| users.changes == 0).steady += 1;
        Self(())
    }
}

impl Drop for SteadyNetwork {
    fn drop(&mut self) {
        users().steady -= 1;
        LEFT.notify_all();
    }
}

/// As long as it exists, its owner alone may change the network.
pub struct NetworkChange(());

impl NetworkChange {
    /// Waits for those that rely on it, and for who changes it now.
    #[must_use]
    pub fn begin() -> Self {
        users().changes += 1;
        wait(|users| users.steady == 0 && !users.changing).changing = true;
        Self(())
    }
}

impl Drop for NetworkChange {
    fn drop(&mut self) {
        let mut users = users();
        users.changes -= 1;
        users.changing = false;
        LEFT.notify_all();
    }
}
