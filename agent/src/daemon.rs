//! The composition root of `cortex-agent run`.
