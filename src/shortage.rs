//! What this process can be short of when it opens a connection, told apart from what the other side does. Pure.
//!
//! A receiver has no part in it: an attempt that could not begin for such a reason is no attempt.

use std::io;

/// What a connection needs and a process can run out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// File descriptors: of the process, or of the whole machine.
    Descriptors,
    /// Local ports for connections to one address.
    Ports,
    /// Memory of the kernel or of the resolver.
    Memory,
}

impl Resource {
    /// Every resource.
    pub const ALL: [Resource; 3] = [Resource::Descriptors, Resource::Ports, Resource::Memory];

    /// The resource as it is written in JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Resource::Descriptors => "descriptors",
            Resource::Ports => "ports",
            Resource::Memory => "memory",
        }
    }
}

/// Why this process could not open a connection, although the other side may be well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Shortage {
    pub of: Resource,
    /// One sentence: what is used up, and how to mend it.
    pub why: String,
}

// The same numbers on every Unix; the standard library has no kind for these errors.
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;
#[cfg(any(target_os = "linux", target_os = "android"))]
const ENOBUFS: i32 = 105;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const ENOBUFS: i32 = 55;

const OF_PROCESS: &str = "this process has no file descriptor left; raise its limit of open files (`ulimit -n`, or LimitNOFILE in the unit)";
const OF_MACHINE: &str =
    "this machine has no file descriptor left; raise fs.file-max, or find who has so many files open";
const PORTS: &str = "no local port is left for connections to this receiver; widen net.ipv4.ip_local_port_range, or lower the endpoint's in_flight_max";
const MEMORY: &str = "the system has no memory left for another connection; give it more";

impl Shortage {
    /// The shortage that an error of opening or accepting a connection tells of; `None` when the error has
    /// another cause.
    pub fn in_error(error: &io::Error) -> Option<Shortage> {
        // Only the system knows what it is short of; libraries use the same kinds for other things.
        let code = error.raw_os_error()?;
        let (of, why) = match (code, error.kind()) {
            (EMFILE, _) => (Resource::Descriptors, OF_PROCESS),
            (ENFILE, _) => (Resource::Descriptors, OF_MACHINE),
            (_, io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse) => (Resource::Ports, PORTS),
            // The third is told by epoll when a user watches too many sockets.
            (ENOBUFS, _)
            | (_, io::ErrorKind::OutOfMemory | io::ErrorKind::WouldBlock | io::ErrorKind::StorageFull) => {
                (Resource::Memory, MEMORY)
            }
            _ => return None,
        };
        Some(Shortage { of, why: why.to_owned() })
    }

    /// All connections that deliveries may have open are in use, or as many as one receiver may have of them.
    pub fn of_budget(max: usize) -> Shortage {
        let why = format!(
            "deliveries may have {max} connections open, and the part of one receiver is in use; raise the limit \
             of open files (`ulimit -n`, or LimitNOFILE in the unit)"
        );
        Shortage { of: Resource::Descriptors, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the system says, by number, on Linux.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_this_process_lacks_is_told_from_what_a_receiver_does() {
        use Resource::{Descriptors, Memory, Ports};
        for (code, name, of) in [
            (24, "EMFILE", Some(Descriptors)),
            (23, "ENFILE", Some(Descriptors)),
            (99, "EADDRNOTAVAIL", Some(Ports)),
            (98, "EADDRINUSE", Some(Ports)),
            (105, "ENOBUFS", Some(Memory)),
            (12, "ENOMEM", Some(Memory)),
            (11, "EAGAIN", Some(Memory)),
            (28, "ENOSPC", Some(Memory)),
            (111, "ECONNREFUSED", None),
            (104, "ECONNRESET", None),
            (103, "ECONNABORTED", None),
            (110, "ETIMEDOUT", None),
            (113, "EHOSTUNREACH", None),
            (101, "ENETUNREACH", None),
            (100, "ENETDOWN", None),
            (13, "EACCES", None),
            (1, "EPERM", None),
            (22, "EINVAL", None),
            (32, "EPIPE", None),
        ] {
            let error = io::Error::from_raw_os_error(code);
            assert_eq!(Shortage::in_error(&error).map(|shortage| shortage.of), of, "{name}");
        }
    }

    #[test]
    fn an_error_that_the_system_did_not_tell_is_no_shortage() {
        for kind in [io::ErrorKind::WouldBlock, io::ErrorKind::AddrInUse, io::ErrorKind::OutOfMemory] {
            assert_eq!(Shortage::in_error(&io::Error::new(kind, "told by a library")), None, "{kind}");
        }
    }
}
