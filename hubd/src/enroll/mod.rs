//! Admitting nodes and operators.
