//! Where this agent keeps its state and what it may do.
