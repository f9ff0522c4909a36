//! Files of workspaces on nodes: `ls`, `cat`, `stat`, `write`, `rm`, `mkdir`, a file each; what they
//! share is here and in `view`.

mod cat;
mod ls;
mod mkdir;
mod rm;
mod stat;
mod view;
mod write;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use bytes::Bytes;
use cortex_proto::v1::{self, file_down, file_request, file_up};
use cortex_proto::{CODE_TRAILER, FILE_WINDOW_BYTES};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

pub(super) use self::cat::{CatArgs, cat};
pub(super) use self::ls::{LsArgs, ls};
pub(super) use self::mkdir::{MkdirArgs, mkdir};
pub(super) use self::rm::{RmArgs, rm};
pub(super) use self::stat::{StatArgs, stat};
pub(super) use self::write::{WriteArgs, write};
use super::error::{CliError, Exit};
use super::{Global, hub};

/// Frames on their way to the hub; their bytes are bounded by the window.
const FRAMES: usize = 4;
/// Credit is given in portions of this size: a few of them make a window.
const PORTION_BYTES: u64 = FILE_WINDOW_BYTES / 4;

/// Whose file, as it is written on the command line: `NODE:WORKSPACE/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    node: String,
    workspace: String,
    path: Vec<u8>,
}

impl Target {
    fn parse(text: OsString) -> Result<Self, CliError> {
        let shown = text.to_string_lossy().into_owned();
        let wrong = || {
            CliError::usage(format!("{shown:?} is not NODE:WORKSPACE/path"))
                .hint("cortex-agent ls build-1:app/src lists a directory of the workspace app")
        };
        let text = text.into_vec();
        let colon = text.iter().position(|byte| *byte == b':').ok_or_else(wrong)?;
        let (node, rest) = (text[..colon].to_vec(), &text[colon + 1..]);
        let slash = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
        let workspace = String::from_utf8(rest[..slash].to_vec()).map_err(|_| wrong())?;
        let node = String::from_utf8(node).map_err(|_| wrong())?;
        if node.is_empty() || workspace.is_empty() {
            return Err(wrong());
        }
        // As with every program: a slash at the end says that a directory is meant.
        let mut path = rest.get(slash + 1..).unwrap_or_default();
        while let Some(shorter) = path.strip_suffix(b"/") {
            path = shorter;
        }
        Ok(Self { node, workspace, path: path.to_vec() })
    }

    /// As it was written.
    fn shown(&self) -> String {
        let path = view::shown(&self.path);
        let slash = if path.is_empty() { "" } else { "/" };
        format!("{}:{}{slash}{path}", self.node, self.workspace)
    }
}

/// An operation under way.
struct Conversation {
    up: mpsc::Sender<v1::FileUp>,
    down: Streaming<v1::FileDown>,
    shown: String,
    change: bool,
    /// Bytes that were dealt with and not acknowledged.
    untold: u64,
}

impl Conversation {
    /// Asks for something that changes nothing.
    async fn look(
        global: &Global,
        target: Target,
        action: file_request::Action,
    ) -> Result<Self, CliError> {
        Self::begin(global, target, action, false).await
    }

    /// Asks for a change.
    async fn change(
        global: &Global,
        target: Target,
        action: file_request::Action,
    ) -> Result<Self, CliError> {
        Self::begin(global, target, action, true).await
    }

    async fn begin(
        global: &Global,
        target: Target,
        action: file_request::Action,
        change: bool,
    ) -> Result<Self, CliError> {
        let mut client = hub::operator(global).await?;
        let shown = target.shown();
        let request = v1::FileRequest {
            workspace: target.workspace,
            workspace_id: Bytes::new(),
            path: target.path.into(),
            action: Some(action),
        };
        let start = v1::FileStart { node: target.node, request: Some(request) };
        let (up, frames) = mpsc::channel(FRAMES);
        up.try_send(frame(file_up::Frame::Start(start))).expect("a new channel has room");
        let frames = ReceiverStream::new(frames);
        let opened = if change {
            client.change_files(frames).await
        } else {
            client.read_files(frames).await
        };
        let down = opened?.into_inner();
        Ok(Self { up, down, shown, change, untold: 0 })
    }

    /// The next frame of the node.
    async fn next(&mut self) -> Result<file_down::Frame, CliError> {
        loop {
            match self.down.message().await {
                // Frames that this version does not know say nothing to it.
                Ok(Some(v1::FileDown { frame: None })) => {}
                Ok(Some(v1::FileDown { frame: Some(frame) })) => return Ok(frame),
                Ok(None) => {
                    return Err(self.lost(Status::unavailable("the hub closed the stream early")));
                }
                Err(status) => return Err(self.lost(status)),
            }
        }
    }

    /// The answer of an operation that sends nothing but its end.
    async fn end(&mut self) -> Result<v1::FileDone, CliError> {
        loop {
            if let file_down::Frame::Done(done) = self.next().await? {
                return Ok(done);
            }
        }
    }

    /// Says that so much of what came is dealt with.
    async fn taken(&mut self, bytes: u64) {
        self.untold += bytes;
        if self.untold >= PORTION_BYTES {
            let bytes = std::mem::take(&mut self.untold);
            // A stream that has ended says so when it is read.
            self.up.send(frame(file_up::Frame::Credit(v1::Credit { bytes }))).await.ok();
        }
    }

    /// The same of entries.
    async fn taken_entries(&mut self, entries: &v1::FileEntries) {
        self.taken(entries.encoded_len() as u64).await;
    }

    /// What the hub said; or, if it said nothing, what that means for a change.
    fn lost(&self, status: Status) -> CliError {
        if !self.change || status.metadata().contains_key(CODE_TRAILER) {
            return status.into();
        }
        let text = "the connection to the hub was lost; whether this was done is not known";
        CliError::new(Exit::Unreachable, text)
            .because(status)
            .hint(format!("cortex-agent stat {}", self.shown))
    }
}

fn frame(frame: file_up::Frame) -> v1::FileUp {
    v1::FileUp { frame: Some(frame) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_a_node_a_workspace_and_a_path_of_bytes() {
        let parse = |text: &[u8]| Target::parse(OsString::from_vec(text.to_vec()));
        for (text, node, workspace, path) in [
            (&b"n:w"[..], "n", "w", &b""[..]),
            (b"n:w/", "n", "w", b""),
            (b"n:w/a/b", "n", "w", b"a/b"),
            (b"n:w/a/", "n", "w", b"a"),
            (b"n:w/a:b", "n", "w", b"a:b"),
            (b"n:w/\xff", "n", "w", b"\xff"),
            // The hub refuses it; it is not made into something else here.
            (b"n:w//a", "n", "w", b"/a"),
            (b"n:w/../x", "n", "w", b"../x"),
        ] {
            let expected =
                Target { node: node.into(), workspace: workspace.into(), path: path.into() };
            assert_eq!(parse(text).unwrap(), expected);
        }
        for text in [&b"n"[..], b":w", b"n:", b"n:/a", b"", b"n:\xff/a"] {
            assert_eq!(parse(text).unwrap_err().exit(), Exit::Usage);
        }
    }
}
