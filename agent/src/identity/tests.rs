use std::os::unix::fs::PermissionsExt as _;

use super::testing::Ca;
use super::*;

const END: i64 = 2_000_000_000_000;

fn state() -> (tempfile::TempDir, StateDir) {
    let folder = tempfile::tempdir().unwrap();
    let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
    (folder, state)
}

/// A joined node.
fn joined(state: &StateDir, ca: &Ca) -> NodeIdentity {
    NodeIdentity::pending_key(state).unwrap();
    let identity = ca.node(&state.identity(), END);
    identity.store(state).unwrap();
    identity
}

#[test]
fn credentials_survive_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Credentials::load(folder.path()).unwrap().is_none());
    let mut written = testing::credentials();
    written.authorities.push(Ca::new().certificate);
    written.store(folder.path()).unwrap();
    let read = Credentials::load(folder.path()).unwrap().unwrap();
    assert_eq!(read.own.certificate, written.own.certificate);
    assert_eq!(read.own.key, written.own.key);
    assert_eq!(read.authorities, written.authorities);
    assert_eq!(read.not_after_ms(), END);
}

#[test]
fn key_that_others_may_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    testing::credentials().store(folder.path()).unwrap();
    let key = folder.path().join(KEY);
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(
        Credentials::load(folder.path()),
        Err(ConfigError::TooOpen { mode: 0o640, .. })
    ));
}

#[test]
fn identity_survives_the_disk_and_is_none_before_its_last_file() {
    let (_folder, state) = state();
    assert!(NodeIdentity::load(&state).unwrap().is_none());
    let written = joined(&state, &Ca::new());
    let read = NodeIdentity::load(&state).unwrap().unwrap();
    assert_eq!((read.node_id, read.mesh, read.generation), (written.node_id, written.mesh, 1));
    assert_eq!(read.credentials.own.certificate, written.credentials.own.certificate);
    std::fs::remove_file(state.identity().join(NODE)).unwrap();
    assert!(NodeIdentity::load(&state).unwrap().is_none());
    // Joining again goes on with the same key.
    assert!(NodeIdentity::pending_key(&state).unwrap().fits(&read.credentials.own.certificate));
}

#[test]
fn certificate_of_another_node_is_noticed() {
    let (_folder, state) = state();
    let ca = Ca::new();
    joined(&state, &ca);
    let other = ca.node(&state.identity(), END);
    let pem = pem::encode("CERTIFICATE", &other.credentials.own.certificate);
    std::fs::write(state.identity().join(CERTIFICATE), pem).unwrap();
    assert!(matches!(NodeIdentity::load(&state), Err(ConfigError::Damaged { .. })));
}

#[test]
fn replacing_keeps_the_old_identity_whatever_moment_it_is_interrupted_at() {
    // How many of the three steps happen before the crash: complete, put aside, put in place.
    for steps in 0..=3 {
        let (_folder, state) = state();
        let ca = Ca::new();
        let old = joined(&state, &ca);
        let key_before = std::fs::read(state.identity().join(KEY)).unwrap();
        NodeIdentity::replacement_key(&state).unwrap();
        let new = ca.node(&state.new_identity(), END);
        if steps >= 1 {
            new.store_in(&state.new_identity()).unwrap();
        }
        if steps >= 2 {
            aside::put_aside(&state, old.node_id).unwrap();
        }
        if steps >= 3 {
            aside::finish_replacement(&state).unwrap();
        }
        let loaded = NodeIdentity::load(&state).unwrap().unwrap();
        let expected = if steps >= 2 { &new } else { &old };
        assert_eq!(loaded.node_id, expected.node_id, "after {steps} steps");
        let kept = match steps {
            0 | 1 => state.identity(),
            _ => state.path().join(format!("identity.old-{}", old.node_id)),
        };
        assert_eq!(std::fs::read(kept.join(KEY)).unwrap(), key_before, "after {steps} steps");
    }
}

#[test]
fn what_is_put_aside_twice_is_kept_twice() {
    let (_folder, state) = state();
    let ca = Ca::new();
    let identity = joined(&state, &ca);
    let first = NodeIdentity::put_aside(&state, identity.node_id).unwrap();
    assert!(NodeIdentity::load(&state).unwrap().is_none());
    joined(&state, &ca);
    let second = NodeIdentity::put_aside(&state, identity.node_id).unwrap();
    assert!(first.join(KEY).exists() && second.join(KEY).exists());
}

#[test]
fn after_leaving_not_even_a_prepared_replacement_comes_back() {
    let (_folder, state) = state();
    let ca = Ca::new();
    let identity = joined(&state, &ca);
    NodeIdentity::replacement_key(&state).unwrap();
    ca.node(&state.new_identity(), END).store_in(&state.new_identity()).unwrap();
    NodeIdentity::put_aside(&state, identity.node_id).unwrap();
    assert!(NodeIdentity::load(&state).unwrap().is_none());
}

#[test]
fn only_authorities_are_taken_for_authorities() {
    let ca = Ca::new();
    let leaf = testing::certificate_until(END);
    let twice = [ca.certificate.as_ref(), ca.certificate.as_ref()];
    assert_eq!(authorities_of(twice).unwrap(), std::slice::from_ref(&ca.certificate));
    assert!(authorities_of([leaf.as_ref()]).is_err());
    assert!(authorities_of([b"x".as_slice()]).is_err());
    let many: Vec<_> = (0..=MAX_CERTIFICATES).map(|_| Ca::new().certificate).collect();
    assert!(authorities_of(many.iter().map(AsRef::as_ref)).is_err());
}
