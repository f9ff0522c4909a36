//! Admitting nodes and operators: invites, the certificate authority, and the validation that
//! stands between an unknown caller and the store.

pub mod ca;
pub mod validator;
