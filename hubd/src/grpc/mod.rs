//! The only place where protocol and domain meet.
