//! Operators' logins on this machine: a directory each, and which of them is current.

use std::path::{Path, PathBuf};

use cortex_shared::ids::MeshId;
use cortex_shared::policy::Role;
use cortex_shared::{durable, labels};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{ConfigError, read_bounded, read_json, write_json, write_private};
use crate::client::{ConnectError, HubAddress, HubClient, Trust};
use crate::identity::{Credentials, IdentityKey, holder_of};

/// The directory with all contexts of one user.
#[derive(Clone, Debug)]
pub struct ConfigDir(PathBuf);

/// Who somebody is, at which hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// Name of the context on this machine.
    pub name: String,
    /// Where the hub is.
    pub hub: HubAddress,
    /// The operator's name at the hub.
    pub operator: String,
    /// What it may do there.
    pub role: Role,
    /// The hub's mesh.
    pub mesh: MeshId,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawContext {
    hub: String,
    operator: String,
    role: Role,
    mesh_id: MeshId,
}

impl ConfigDir {
    /// `CORTEX_CONFIG_DIR`, or the user's configuration directory.
    ///
    /// # Errors
    /// If the user has no home.
    pub fn resolve() -> Result<Self, ConfigError> {
        if let Some(named) = std::env::var_os("CORTEX_CONFIG_DIR").filter(|v| !v.is_empty()) {
            return Ok(Self(named.into()));
        }
        directories::ProjectDirs::from("", "", "cortex")
            .map(|dirs| Self(dirs.config_dir().to_owned()))
            .ok_or(ConfigError::NoHome { what: "configuration directory (CORTEX_CONFIG_DIR)" })
    }

    /// A directory in a place of the caller's choice.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    fn context_dir(&self, name: &str) -> Result<PathBuf, ConfigError> {
        // A name is one harmless path component.
        labels::check_name(name).map_err(|_| ConfigError::NoSuchContext(name.to_owned()))?;
        Ok(self.0.join("contexts").join(name))
    }

    fn current_file(&self) -> PathBuf {
        self.0.join("current-context")
    }

    /// The context to use: the named one, else the current one.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub fn choose(&self, named: Option<&str>) -> Result<Context, ConfigError> {
        match named {
            Some(name) => self.load(name),
            None => self.load(&self.current()?.ok_or(ConfigError::NotLoggedIn)?),
        }
    }

    /// Name of the current context.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn current(&self) -> Result<Option<String>, ConfigError> {
        let contents = read_bounded(&self.current_file())?;
        let name = contents.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
        Ok(name.filter(|name| !name.is_empty()))
    }

    /// Reads one context.
    ///
    /// # Errors
    /// If there is none of this name, or it is damaged.
    pub fn load(&self, name: &str) -> Result<Context, ConfigError> {
        let path = self.context_dir(name)?.join("context.json");
        let raw: RawContext =
            read_json(&path)?.ok_or_else(|| ConfigError::NoSuchContext(name.to_owned()))?;
        let hub = raw
            .hub
            .parse()
            .map_err(|error| ConfigError::Damaged { path, problem: format!("{error}") })?;
        Ok(Context {
            name: name.to_owned(),
            hub,
            operator: raw.operator,
            role: raw.role,
            mesh: raw.mesh_id,
        })
    }

    /// All contexts, sorted by name. Damaged ones are left out: using one says what is wrong.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self) -> Result<Vec<Context>, ConfigError> {
        let folder = self.0.join("contexts");
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(ConfigError::Read { path: folder, source }),
        };
        let mut contexts: Vec<Context> =
            entries.filter_map(|entry| self.load(entry.ok()?.file_name().to_str()?).ok()).collect();
        contexts.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(contexts)
    }

    /// The key for a new login under this name; made now, or left by an interrupted attempt.
    ///
    /// # Errors
    /// If the name is no name, or those of the file system.
    pub fn pending_key(&self, name: &str) -> Result<IdentityKey, ConfigError> {
        let folder = self.context_dir(name)?;
        private_folder(&folder)?;
        IdentityKey::load_or_make(&folder)
    }

    /// Stores a context with its credentials, and makes it the current one. `context.json` comes
    /// last: without it there is no context.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn store(&self, context: &Context, credentials: &Credentials) -> Result<(), ConfigError> {
        let folder = self.context_dir(&context.name)?;
        private_folder(&folder)?;
        credentials.store(&folder)?;
        let raw = RawContext {
            hub: context.hub.to_string(),
            operator: context.operator.clone(),
            role: context.role,
            mesh_id: context.mesh,
        };
        write_json(&folder.join("context.json"), &raw)?;
        self.make_current(&context.name)
    }

    /// Makes a context the current one.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn make_current(&self, name: &str) -> Result<(), ConfigError> {
        self.load(name)?;
        write_private(&self.current_file(), format!("{name}\n").as_bytes())
    }

    /// Forgets a context and its key.
    ///
    /// # Errors
    /// If there is none of this name, or those of the file system.
    pub fn remove(&self, name: &str) -> Result<(), ConfigError> {
        let folder = self.context_dir(name)?;
        if !folder.is_dir() {
            return Err(ConfigError::NoSuchContext(name.to_owned()));
        }
        std::fs::remove_dir_all(&folder)
            .map_err(|source| ConfigError::Write { path: folder, source })?;
        if self.current()?.as_deref() == Some(name) {
            let path = self.current_file();
            std::fs::remove_file(&path).map_err(|source| ConfigError::Write { path, source })?;
        }
        Ok(())
    }

    /// Takes over the authorities that the hub names, over a connection on which it proved itself, and
    /// the certificate that it has signed anew for the same key and the same operator. As with a node,
    /// a list that names no authority which is trusted already is refused.
    ///
    /// # Errors
    /// If what the hub says is refused, or cannot be stored: nothing has changed then.
    pub fn follow(
        &self,
        context: &Context,
        authorities: Vec<CertificateDer<'static>>,
        certificate: Option<CertificateDer<'static>>,
    ) -> Result<(), ConfigError> {
        let folder = self.context_dir(&context.name)?;
        let mut credentials = self.credentials(context)?;
        let refused = |problem: &str| ConfigError::Refused { problem: problem.to_owned() };
        if !authorities.iter().any(|named| credentials.authorities.contains(named)) {
            return Err(refused("none of the authorities that the hub names is known here"));
        }
        if let Some(certificate) = certificate {
            let fits = IdentityKey::load(&folder)?.is_some_and(|key| key.fits(&certificate))
                && holder_of(&certificate) == holder_of(&credentials.own.certificate);
            if !fits {
                return Err(refused("the certificate from the hub is for somebody else"));
            }
            credentials.own.certificate = certificate;
        } else if authorities == credentials.authorities {
            return Ok(());
        }
        credentials.authorities = authorities;
        credentials.store(&folder)
    }

    /// The credentials of a context.
    ///
    /// # Errors
    /// If they are missing, damaged or readable by others.
    pub fn credentials(&self, context: &Context) -> Result<Credentials, ConfigError> {
        let folder = self.context_dir(&context.name)?;
        Credentials::load(&folder)?
            .ok_or_else(|| ConfigError::Damaged { path: folder, problem: "no key".to_owned() })
    }
}

impl Context {
    /// A client that acts as this operator.
    ///
    /// # Errors
    /// If certificate and key do not fit each other.
    pub fn client(&self, credentials: Credentials) -> Result<HubClient, ConnectError> {
        let trust = Trust::Authorities { certificates: credentials.authorities, mesh: self.mesh };
        HubClient::new(self.hub.clone(), trust, Some(credentials.own))
    }
}

fn private_folder(path: &Path) -> Result<(), ConfigError> {
    durable::create_private_folder(path)
        .map_err(|source| ConfigError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cortex_shared::peer::{Holder, PeerIdentity};

    use crate::identity::testing::{Ca, credentials};

    fn context(name: &str) -> Context {
        Context {
            name: name.to_owned(),
            hub: "hub:7443".parse().unwrap(),
            operator: "ann".to_owned(),
            role: Role::Admin,
            mesh: MeshId::new(),
        }
    }

    #[test]
    fn contexts_are_stored_listed_chosen_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let config = ConfigDir::at(folder.path().join("config"));
        assert!(matches!(config.choose(None), Err(ConfigError::NotLoggedIn)));
        assert!(config.list().unwrap().is_empty());
        let (home, work) = (context("home"), context("work"));
        config.store(&home, &credentials()).unwrap();
        config.store(&work, &credentials()).unwrap();
        assert_eq!(config.choose(None).unwrap(), work);
        assert_eq!(config.choose(Some("home")).unwrap(), home);
        assert_eq!(config.list().unwrap(), [home.clone(), work]);
        config.make_current("home").unwrap();
        assert_eq!(config.choose(None).unwrap(), home);
        assert!(config.credentials(&home).is_ok());
        config.remove("home").unwrap();
        assert!(matches!(config.choose(None), Err(ConfigError::NotLoggedIn)));
        assert!(matches!(config.load("home"), Err(ConfigError::NoSuchContext(_))));
    }

    #[test]
    fn a_name_cannot_leave_the_directory() {
        let folder = tempfile::tempdir().unwrap();
        let config = ConfigDir::at(folder.path().to_owned());
        for name in ["../x", "..", "", "a/b", "/etc"] {
            assert!(matches!(config.load(name), Err(ConfigError::NoSuchContext(_))), "{name}");
            assert!(config.remove(name).is_err(), "{name}");
        }
    }

    #[test]
    fn removing_another_context_keeps_the_current_one() {
        let folder = tempfile::tempdir().unwrap();
        let config = ConfigDir::at(folder.path().to_owned());
        config.store(&context("a"), &credentials()).unwrap();
        config.store(&context("b"), &credentials()).unwrap();
        config.remove("a").unwrap();
        assert_eq!(config.current().unwrap().as_deref(), Some("b"));
    }

    #[test]
    fn a_login_follows_only_an_authority_that_a_known_one_vouches_for() {
        let folder = tempfile::tempdir().unwrap();
        let config = ConfigDir::at(folder.path().to_owned());
        let context = context("home");
        config.pending_key("home").unwrap();
        let key = config.pending_key("home").unwrap();
        let (old, next) = (Ca::new(), Ca::new());
        let peer = |name: &str| PeerIdentity {
            mesh: context.mesh,
            holder: Holder::Operator { name: name.into(), role: Role::Admin },
        };
        let sign = |ca: &Ca, name: &str| {
            ca.sign(&key.request_der().unwrap(), &peer(name), 2_000_000_000_000)
        };
        let both = vec![old.certificate.clone(), next.certificate.clone()];
        let login = key.with(sign(&old, "ann"), vec![old.certificate.clone()]);
        config.store(&context, &login).unwrap();

        config.follow(&context, both.clone(), None).unwrap();
        let anew = sign(&next, "ann");
        config.follow(&context, both.clone(), Some(anew.clone())).unwrap();
        let stranger = config.pending_key("stranger").unwrap();
        let stolen = next.sign(&stranger.request_der().unwrap(), &peer("ann"), 2_000_000_000_000);
        for (authorities, certificate) in [
            (vec![Ca::new().certificate.clone()], None),
            (vec![], None),
            (both.clone(), Some(sign(&next, "bob"))),
            (both.clone(), Some(stolen)),
        ] {
            assert!(config.follow(&context, authorities, certificate).is_err());
        }
        let kept = config.credentials(&context).unwrap();
        assert_eq!((kept.own.certificate, kept.authorities), (anew, both));
        let next = vec![next.certificate.clone()];
        config.follow(&context, next.clone(), None).unwrap();
        assert_eq!(config.credentials(&context).unwrap().authorities, next);
    }
}
