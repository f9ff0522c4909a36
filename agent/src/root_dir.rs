//! A directory handle that nothing can leave.
