//! How refusals look to a caller: a gRPC code, a text, a stable word and, where there is one, the
//! time after which to try again. Internal errors get an id that also stands in the log.

use std::time::Duration;

use cortex_proto::{CODE_TRAILER, RETRY_AFTER_TRAILER};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

/// A refusal with its stable word.
pub fn refuse(code: Code, word: &'static str, text: impl Into<String>) -> Status {
    let mut status = Status::new(code, text);
    status.metadata_mut().insert(CODE_TRAILER, MetadataValue::from_static(word));
    status
}

/// Adds the time after which a repetition may succeed.
pub fn with_retry_after(mut status: Status, after: Duration) -> Status {
    let value = MetadataValue::from(u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
    status.metadata_mut().insert(RETRY_AFTER_TRAILER, value);
    status
}

/// Something the caller sent is not what the protocol allows.
pub fn invalid(text: impl Into<String>) -> Status {
    refuse(Code::InvalidArgument, "invalid_argument", text)
}

/// An error of the hub's own: the caller gets an id, the log gets the chain.
pub fn internal(error: &(dyn std::error::Error + 'static)) -> Status {
    let id = format!("{:08x}", rand::random::<u32>());
    let mut chain = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        chain.push_str(": ");
        chain.push_str(&error.to_string());
        source = error.source();
    }
    tracing::error!(error_id = %id, error = %chain, "internal error");
    refuse(Code::Internal, "internal", format!("the hub failed (error id {id})"))
}
