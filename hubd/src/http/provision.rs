//! Installing nodes: the script, and the agent for it to install.
//!
//! Both are the same for everybody, and nothing of a request is ever put into them. What goes wrong is a
//! status that makes `curl -f` fail, with a problem document: never a script with an error in it.
//!
//! The agent is a file that its administrator may replace at any time. Its hash is worked out when it is
//! first asked for, and again after it has changed.
//!
//! Anybody may download, so all downloads together have a bound: there are so many places, and each holds
//! one piece of the file in memory. Whoever finds none is told when to come again.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
    IF_RANGE, RANGE,
};
use http::request::Parts;
use http::{HeaderValue, Response, StatusCode};
use sha2::Digest as _;
use tokio::sync::Mutex;

use super::error::{Problem, internal};
use super::server::{Download, Downloading};
use crate::grpc::auth::Peer;
use crate::shares::{Place, Shares};

const SCRIPT: &str = include_str!("../../../install.sh");
/// Platforms that there may be an agent for, as `uname` says them.
const PLATFORMS: [&str; 2] = ["linux-x86_64", "linux-aarch64"];
/// Where packages put what the hub gives out.
const PACKAGED: &str = "/usr/lib/cortex";
/// Bytes read at once, and held by each download.
const PIECE: usize = 64 * 1024;
/// Seconds after which somebody who found no place may find one.
const AGAIN_S: u64 = 5;

/// `install.sh`, as it is in the program.
pub(super) fn script() -> Response<Body> {
    let mut response = Response::new(Body::from(SCRIPT));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/x-shellscript; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// What tells one content of a file from another without reading it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

type Hashed = Vec<(&'static str, Stamp, String)>;

/// The agents that can be downloaded.
pub(super) struct Agents {
    folders: Vec<PathBuf>,
    /// Held while one is read: others wait for the same answer.
    hashed: Arc<Mutex<Hashed>>,
    /// Those who may download at the same time.
    places: Arc<Shares>,
}

/// An agent to be sent.
struct Found {
    file: Arc<File>,
    size: u64,
    sha256: String,
}

impl Agents {
    /// Those in this folder; without one, beside the hub's own program, or where packages put them. So many
    /// may be downloaded at the same time, a quarter of them by one address.
    pub(super) fn new(folder: Option<PathBuf>, downloads: usize) -> Self {
        let folders = match folder {
            Some(folder) => vec![folder],
            None => {
                let program = std::env::current_exe().ok();
                let beside = program.and_then(|path| path.parent().map(PathBuf::from));
                beside.into_iter().chain([PathBuf::from(PACKAGED)]).collect()
            }
        };
        Self { folders, hashed: Arc::default(), places: Shares::new(downloads, downloads / 4) }
    }

    async fn find(&self, platform: &str) -> Result<Found, Problem> {
        let known = PLATFORMS.into_iter().find(|known| *known == platform);
        let Some(platform) = known else {
            let status = StatusCode::NOT_FOUND;
            return Err(Problem::new(status, "unknown_platform", "there is no such platform")
                .hint(format!("one of {}", PLATFORMS.join(", "))));
        };
        let folders = self.folders.clone();
        let mut hashed = Arc::clone(&self.hashed).lock_owned().await;
        let found = tokio::task::spawn_blocking(move || find_in(&folders, platform, &mut hashed));
        match found.await.map_err(|error| internal(&error))? {
            Ok(Some(found)) => Ok(found),
            Ok(None) => {
                let text = format!("this hub has no agent for {platform}");
                Err(Problem::new(StatusCode::NOT_FOUND, "no_agent", text).hint(
                    "put it into the folder that the hub's setting http_agents names, or install by hand",
                ))
            }
            Err(error) => Err(internal(&error)),
        }
    }
}

fn own_platform() -> String {
    format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH)
}

fn find_in(
    folders: &[PathBuf],
    platform: &'static str,
    hashed: &mut Hashed,
) -> io::Result<Option<Found>> {
    let named = format!("cortex-agent-{platform}");
    let own = (own_platform() == platform).then_some("cortex-agent");
    for folder in folders {
        for name in [Some(named.as_str()), own].into_iter().flatten() {
            let file = match File::open(folder.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            let metadata = file.metadata()?;
            if !metadata.is_file() {
                continue;
            }
            let stamp = Stamp::of(&metadata);
            let known = hashed.iter().find(|(of, at, _)| *of == platform && *at == stamp);
            let sha256 = match known {
                Some((_, _, sha256)) => sha256.clone(),
                None => {
                    let sha256 = hash(&file)?;
                    hashed.retain(|(of, ..)| *of != platform);
                    hashed.push((platform, stamp, sha256.clone()));
                    sha256
                }
            };
            return Ok(Some(Found { file: Arc::new(file), size: metadata.len(), sha256 }));
        }
    }
    Ok(None)
}

fn hash(mut file: &File) -> io::Result<String> {
    let (mut hasher, mut piece) = (sha2::Sha256::new(), vec![0; PIECE]);
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => hasher.update(&piece[..read]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// An agent, by its platform, or with `.sha256` behind it its hash.
pub(super) async fn file(
    agents: &Agents,
    name: &str,
    request: &Parts,
) -> Result<Response<Body>, Problem> {
    match name.strip_suffix(".sha256") {
        Some(platform) => sha256(agents, platform).await,
        None => agent(agents, name, request).await,
    }
}

/// What of a file is still to be sent, to somebody who has a place for it.
struct Sending {
    file: Arc<File>,
    at: u64,
    end: u64,
    _place: Place,
    _download: Option<Download>,
}

impl Sending {
    /// Piece by piece: the next one is read when the one before was taken.
    fn into_body(self) -> Body {
        Body::from_stream(stream::try_unfold(self, |mut rest| async move {
            if rest.at == rest.end {
                return Ok::<_, io::Error>(None);
            }
            let length = usize::try_from(rest.end - rest.at).unwrap_or(PIECE).min(PIECE);
            let (file, at) = (Arc::clone(&rest.file), rest.at);
            let reading = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; length];
                // One that has become shorter since ends the answer, which its reader notices.
                file.read_exact_at(&mut piece, at).map(|()| Bytes::from(piece))
            });
            let piece = reading.await.map_err(io::Error::other)??;
            rest.at += u64::try_from(length).unwrap_or(u64::MAX);
            Ok(Some((piece, rest)))
        }))
    }
}

/// The hash of an agent, as `sha256sum` writes it.
async fn sha256(agents: &Agents, platform: &str) -> Result<Response<Body>, Problem> {
    let found = agents.find(platform).await?;
    let mut response = Response::new(Body::from(format!("{}  cortex-agent\n", found.sha256)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

/// What of a file is wanted.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    /// From this byte, so many.
    Part(u64, u64),
    /// Nothing of this is there.
    Beyond,
}

/// An agent, or a part of it.
async fn agent(
    agents: &Agents,
    platform: &str,
    request: &Parts,
) -> Result<Response<Body>, Problem> {
    let Found { file, size, sha256 } = agents.find(platform).await?;
    let tag = format!("\"{sha256}\"");
    let text = |name| request.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(ETAG, header(&tag)?);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let has = |tags: &str| tags.split(',').any(|one| one.trim() == tag || one.trim() == "*");
    if text(IF_NONE_MATCH).is_some_and(has) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    // A part of what is no longer there would be worth nothing.
    let range = text(RANGE).filter(|_| text(IF_RANGE).is_none_or(|of| of == tag));
    let (from, length) = match range.map_or(Wanted::All, |range| wanted(range, size)) {
        Wanted::All => (0, size),
        Wanted::Part(from, length) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let shown = format!("bytes {from}-{}/{size}", from + length - 1);
            response.headers_mut().insert(CONTENT_RANGE, header(&shown)?);
            (from, length)
        }
        Wanted::Beyond => {
            let status = StatusCode::RANGE_NOT_SATISFIABLE;
            return Err(Problem::new(status, "range", format!("the agent has {size} bytes")));
        }
    };
    let address = request.extensions.get::<Peer>().and_then(Peer::address);
    let address = address.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip());
    let Some(place) = agents.places.take(address) else {
        let (status, text) = (StatusCode::SERVICE_UNAVAILABLE, "others download just now");
        return Err(Problem::new(status, "busy", text).retry_after(AGAIN_S));
    };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, length.into());
    let download = request.extensions.get::<Downloading>().cloned().map(Downloading::begin);
    let sending =
        Sending { file, at: from, end: from + length, _place: place, _download: download };
    *response.body_mut() = sending.into_body();
    Ok(response)
}

fn header(text: &str) -> Result<HeaderValue, Problem> {
    HeaderValue::from_str(text).map_err(|error| internal(&error))
}

/// Reads a range. Of several, and of what is none, everything is sent, as the standard allows.
fn wanted(range: &str, size: u64) -> Wanted {
    let Some((first, last)) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-'))
    else {
        return Wanted::All;
    };
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let (from, end) = match (number(first), number(last), first.trim(), last.trim()) {
        (Some(from), Some(last), _, _) if from <= last => (from, last.saturating_add(1).min(size)),
        (Some(from), None, _, "") => (from, size),
        (None, Some(0), "", _) => return Wanted::Beyond,
        (None, Some(count), "", _) => (size.saturating_sub(count), size),
        _ => return Wanted::All,
    };
    if from >= size { Wanted::Beyond } else { Wanted::Part(from, end - from) }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse as _;
    use futures_util::StreamExt as _;

    use super::*;

    #[test]
    fn ranges() {
        for (range, expected) in [
            ("bytes=0-0", Wanted::Part(0, 1)),
            ("bytes=10-", Wanted::Part(10, 90)),
            ("bytes=-10", Wanted::Part(90, 10)),
            ("bytes=-1000", Wanted::Part(0, 100)),
            ("bytes=90-1000", Wanted::Part(90, 10)),
            ("bytes=0-18446744073709551615", Wanted::Part(0, 100)),
            ("bytes=100-", Wanted::Beyond),
            ("bytes=-0", Wanted::Beyond),
            ("bytes=5-1", Wanted::All),
            ("bytes=0-1,5-6", Wanted::All),
            ("lines=0-1", Wanted::All),
            ("bytes=x-", Wanted::All),
            ("bytes=-", Wanted::All),
        ] {
            assert_eq!(wanted(range, 100), expected, "{range}");
        }
        assert_eq!(wanted("bytes=0-", 0), Wanted::Beyond);
    }

    #[tokio::test]
    async fn the_agent_is_sent_with_its_hash_and_anew_when_it_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let agents = Agents::new(Some(folder.path().to_owned()), 8);
        let missing = agents.find("linux-aarch64").await.err().unwrap();
        assert_eq!(missing.code(), "no_agent");
        let other = agents.find("../../etc/passwd").await.err().unwrap();
        assert_eq!(other.code(), "unknown_platform");
        for content in ["one", "another"] {
            let path = folder.path().join("new");
            std::fs::write(&path, content).unwrap();
            std::fs::rename(&path, folder.path().join("cortex-agent-linux-aarch64")).unwrap();
            let found = agents.find("linux-aarch64").await.ok().unwrap();
            let expected = sha2::Sha256::digest(content);
            let expected: String = expected.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found.sha256, expected);
            assert_eq!(found.size, content.len() as u64);
        }
    }

    fn request(headers: &[(&'static str, &str)], from: &str) -> Parts {
        let mut request = http::Request::new(()).into_parts().0;
        request.extensions.insert(Peer::Anonymous(from.parse().unwrap()));
        for (name, value) in headers {
            request.headers.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        request
    }

    #[tokio::test]
    async fn whoever_finds_no_place_comes_again_and_a_place_is_free_when_an_answer_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let content = vec![7; 3 * PIECE + 1];
        std::fs::write(folder.path().join("cortex-agent-linux-aarch64"), &content).unwrap();
        let agents = Agents::new(Some(folder.path().to_owned()), 4);
        let ask = async |from: &str| agent(&agents, "linux-aarch64", &request(&[], from)).await;
        let mut answers = Vec::new();
        for from in ["192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1", "192.0.2.4:1"] {
            answers.push(ask(from).await.ok().unwrap());
            let again = ask(from).await.err().unwrap();
            assert_eq!(again.code(), "busy", "one address has a quarter");
        }
        let refused = ask("192.0.2.5:1").await.err().unwrap().into_response();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["retry-after"]),
            (503, &header("5").ok().unwrap())
        );
        let mut piece_by_piece = answers.pop().unwrap().into_body().into_data_stream();
        let mut received = Vec::new();
        while let Some(piece) = piece_by_piece.next().await {
            let piece = piece.unwrap();
            assert!(piece.len() <= PIECE);
            received.extend_from_slice(&piece);
        }
        assert!(received == content);
        drop(piece_by_piece);
        assert!(ask("192.0.2.5:1").await.is_ok(), "it is over");
        answers.clear();
        assert!(ask("192.0.2.1:1").await.is_ok(), "nobody wanted the answer");
    }

    #[tokio::test]
    async fn whoever_has_it_is_told_so_and_a_part_is_a_part_of_the_same() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cortex-agent-linux-aarch64"), "0123456789").unwrap();
        let agents = Agents::new(Some(folder.path().to_owned()), 8);
        let ask = async |headers: &[(&'static str, &str)]| {
            agent(&agents, "linux-aarch64", &request(headers, "192.0.2.1:1")).await
        };
        let whole = ask(&[]).await.ok().unwrap();
        let tag = whole.headers()[ETAG].to_str().unwrap().to_owned();
        assert_eq!(ask(&[("if-none-match", &tag)]).await.ok().unwrap().status(), 304);
        let part = ask(&[("range", "bytes=2-4"), ("if-range", &tag)]).await.ok().unwrap();
        assert_eq!(
            (part.status().as_u16(), &part.headers()[CONTENT_RANGE]),
            (206, &header("bytes 2-4/10").ok().unwrap())
        );
        let body = axum::body::to_bytes(part.into_body(), 100).await.unwrap();
        assert_eq!(&body[..], b"234");
        let other = ask(&[("range", "bytes=2-4"), ("if-range", "\"x\"")]).await.ok().unwrap();
        assert_eq!(other.status(), 200);
        assert_eq!(ask(&[("range", "bytes=10-")]).await.err().unwrap().code(), "range");
    }
}
