//! Noticing that the other end of an idle connection is gone without a word.
//!
//! The kernel asks on its own, so an idle connection costs a packet now and then and wakes nobody. It
//! does not ask while data waits for its receipt: those who send have deadlines of their own.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

/// Silence after which the kernel asks.
const IDLE: Duration = Duration::from_secs(6);
/// Between two questions.
const INTERVAL: Duration = Duration::from_secs(3);
/// Unanswered questions after which the connection fails: 15 seconds in all.
const QUESTIONS: u32 = 3;

/// Has the kernel fail this TCP connection about 15 seconds after its other end went away.
///
/// # Errors
/// If it is no TCP connection.
pub fn notice(connection: impl AsFd) -> io::Result<()> {
    let connection = connection.as_fd();
    sockopt::set_tcp_keepidle(connection, IDLE)?;
    sockopt::set_tcp_keepintvl(connection, INTERVAL)?;
    sockopt::set_tcp_keepcnt(connection, QUESTIONS)?;
    Ok(sockopt::set_socket_keepalive(connection, true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let connection = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!sockopt::socket_keepalive(&connection).unwrap());
        notice(&connection).unwrap();
        assert!(sockopt::socket_keepalive(&connection).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&connection).unwrap(), IDLE);
        assert_eq!(sockopt::tcp_keepcnt(&connection).unwrap(), QUESTIONS);
    }
}
