//! The wire protocol of cortex mesh, `cortex.v1`.
//!
//! The comments in `proto/cortex/v1/*.proto` are its manual. This crate holds the generated
//! messages, clients and servers, and the size limits both sides agree on. It holds no logic:
//! messages become domain types once, at the door of each daemon.

mod codec;

/// Generated messages, clients and servers.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::cast_possible_truncation, unreachable_pub)]
    tonic::include_proto!("cortex.v1");
}

/// The compiled description of the protocol, a `google.protobuf.FileDescriptorSet`: every service,
/// method and message, for tools and tests that have to know all of them.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cortex.v1.bin"));

/// Largest payload of a pack, and so of any single piece of content on the wire: 4 MiB.
pub const MAX_PACK_BYTES: usize = 4 * 1024 * 1024;

/// Largest gRPC message either side sends or accepts: a full pack of incompressible data, its
/// index, and the envelope around it. tonic's own limit on receipt is exactly 4 MiB, which such a
/// pack exceeds, so this constant has to be set for encoding and decoding, at client and server.
pub const MAX_MESSAGE_BYTES: usize = MAX_PACK_BYTES + 1024 * 1024;

/// Largest piece of output or standard input in one frame.
pub const MAX_OUTPUT_FRAME_BYTES: usize = 256 * 1024;

/// Output a reader lets a command have under way unless it says otherwise: enough that nobody on the
/// way from a fast command to a fast reader waits for credit.
pub const DEFAULT_OUTPUT_CREDIT: u64 = 4 * 1024 * 1024;

/// Least of it that a hub makes of that where many commands stand still. A reader gives credit back before
/// it has taken so much: no command waits for credit that waits for its output.
pub const LEAST_OUTPUT_CREDIT: u64 = 64 * 1024;

/// Most output that may be under way for one command, whatever the reader grants: what the hub is
/// prepared to hold for it.
pub const MAX_OUTPUT_CREDIT: u64 = 8 * 1024 * 1024;

/// Standard input a caller may have under way before the command has taken any of it.
pub const STDIN_WINDOW_BYTES: u64 = 256 * 1024;

/// Content of a file, or entries of a directory, that may be under way before the receiver has given
/// credit for what it has dealt with.
pub const FILE_WINDOW_BYTES: u64 = 1024 * 1024;

/// HTTP/2 windows of connections that carry control and output. The connection window has a floor
/// of 8 MiB: since h2 0.4.16 a connection on which many small frames lie unread is closed once
/// half the connection window is "spent" on them.
pub const CONTROL_STREAM_WINDOW: u32 = 2 * 1024 * 1024;
/// See [`CONTROL_STREAM_WINDOW`].
pub const CONTROL_CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
/// HTTP/2 windows of connections that carry packs: as large as a long, fast line needs
/// (window / round-trip time is the ceiling of the rate).
pub const BULK_STREAM_WINDOW: u32 = 8 * 1024 * 1024;
/// See [`BULK_STREAM_WINDOW`].
pub const BULK_CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// Largest HTTP/2 frame accepted; larger frames cost less processor time per byte.
pub const HTTP2_FRAME_BYTES: u32 = 256 * 1024;

/// The word of a refusal by a hub that is being restarted: what was asked for was certainly not begun, and
/// may be asked for again.
pub const CODE_DRAINING: &str = "hub_draining";
/// The word of a refusal by a hub whose task is over and whose verdict is on its way to the journal: asked
/// again in a moment, it answers.
pub const CODE_TASK_ENDING: &str = "task_ending";

/// Trailer with the stable code of a refusal.
pub const CODE_TRAILER: &str = "cortex-code";
/// Trailer with the command that helps.
pub const HINT_TRAILER: &str = "cortex-hint";
/// Trailer with the id under which an error of the hub's own stands in its log.
pub const ERROR_ID_TRAILER: &str = "cortex-error-id";
/// Trailer with the milliseconds after which a repetition may succeed.
pub const RETRY_AFTER_TRAILER: &str = "cortex-retry-after-ms";

/// How long a refused caller is asked to wait, if it is asked to.
#[must_use]
pub fn retry_after(trailers: &tonic::metadata::MetadataMap) -> Option<std::time::Duration> {
    let value = trailers.get(RETRY_AFTER_TRAILER)?;
    value.to_str().ok()?.parse().ok().map(std::time::Duration::from_millis)
}
