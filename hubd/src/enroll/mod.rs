//! Admitting nodes and operators: invites, the certificate authorities, and the validation that
//! stands between an unknown caller and the store.

pub mod authorities;
pub mod ca;
pub mod http_certificate;
pub mod hub_certificate;
pub mod limits;
pub mod refusals;
pub mod validator;
