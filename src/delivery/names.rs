//! Addresses of names: the origin's, kept for a while, and the resolver that asks for them.
//!
//! This process asks the name servers itself. A look-up of the C library blocks a thread for as long as it waits for a
//! server, and hundreds of silent names would take all threads from the healthy ones and from everything else (ADR 13).

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;

use super::budget::Permit;
use super::connect::{NotConnected, describe};
use super::lock;
use crate::clock::Stopwatch;
use crate::shortage::{Resource, Shortage};

/// A looked-up name is believed for this long. Deliveries open few connections, but hundreds at once.
const KNOWN_FOR: Duration = Duration::from_secs(10);

/// A failed look-up is believed for this long, so that a queue of tries does not become a queue of look-ups.
const UNKNOWN_FOR: Duration = Duration::from_secs(1);

/// Addresses of one name that are tried, at most.
const ADDRESSES_MAX: usize = 8;

/// Where the system names its name servers, and names of its own (resolv.conf(5), hosts(5)).
const FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// The addresses of one origin's name.
#[derive(Debug, Default)]
pub(super) struct AddressCache {
    known: Mutex<Option<Known>>,
    /// Held during a look-up: there is never more than one for a name, however many tries have given up waiting for it.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Debug)]
struct Known {
    until: Duration,
    addresses: Result<Vec<SocketAddr>, String>,
}

impl AddressCache {
    pub(super) async fn resolve(
        self: &Arc<Self>,
        resolver: &Arc<Resolver>,
        name: &str,
        port: u16,
        watch: &Stopwatch,
        permit: &Arc<Permit>,
    ) -> Result<Vec<SocketAddr>, NotConnected> {
        if let Some(addresses) = self.fresh(watch) {
            return addresses.map_err(NotConnected::Refused);
        }
        let turn = Arc::clone(&self.turn).lock_owned().await;
        if let Some(addresses) = self.fresh(watch) {
            return addresses.map_err(NotConnected::Refused);
        }
        let (names, resolver) = (Arc::clone(self), Arc::clone(resolver));
        let (name, watch) = (name.to_owned(), watch.clone());
        // The look-up has a descriptor open for as long as it takes, also when the try has given up.
        let permit = Arc::clone(permit);
        let look_up = tokio::spawn(async move {
            let addresses = resolver.look_up(&name, port).await;
            names.learn(&addresses, &watch);
            drop((turn, permit));
            addresses
        });
        // Only a runtime that ends stops a look-up.
        let stopped = |_| Err(NotConnected::Refused("the process ends".to_owned()));
        look_up.await.unwrap_or_else(stopped)
    }

    /// Keeps what a look-up came to; a shortage of ours tells nothing about the name.
    pub(super) fn learn(&self, found: &Result<Vec<SocketAddr>, NotConnected>, watch: &Stopwatch) {
        let (addresses, wait) = match found {
            Ok(addresses) => (Ok(addresses.clone()), KNOWN_FOR),
            Err(NotConnected::Refused(why)) => (Err(why.clone()), UNKNOWN_FOR),
            Err(NotConnected::Short(_)) => return,
        };
        let known = Known { until: watch.elapsed() + wait, addresses };
        *lock(&self.known) = Some(known);
    }

    fn fresh(&self, watch: &Stopwatch) -> Option<Result<Vec<SocketAddr>, String>> {
        let known = lock(&self.known);
        let known = known.as_ref().filter(|known| watch.elapsed() < known.until)?;
        Some(known.addresses.clone())
    }
}

/// Asks the system's name servers, and its file of hosts before.
pub(super) struct Resolver {
    /// `None`: what the system's files say.
    given: Option<(ResolverConfig, ResolverOpts)>,
    // A plain lock: the files are looked at before a name is asked for, which is seldom.
    current: Mutex<Option<Current>>,
}

/// The resolver of the files as they were.
struct Current {
    changed: [Option<SystemTime>; 2],
    resolver: Arc<TokioResolver>,
}

impl Resolver {
    /// A resolver that follows the system's files, also when they change.
    pub(super) fn of_system() -> Resolver {
        Resolver { given: None, current: Mutex::default() }
    }

    /// The addresses of a name.
    ///
    /// # Errors
    /// That there are none, or why that can't be known.
    pub(super) async fn look_up(&self, name: &str, port: u16) -> Result<Vec<SocketAddr>, NotConnected> {
        let found = match self.current() {
            Ok(resolver) => resolver.lookup_ip(name).await,
            Err(error) => Err(error),
        };
        let addresses = found.map_err(|error| unresolved(name, &error))?;
        Ok(addresses.iter().take(ADDRESSES_MAX).map(|ip| SocketAddr::new(ip, port)).collect())
    }

    /// The resolver of the files as they are.
    fn current(&self) -> Result<Arc<TokioResolver>, NetError> {
        let changed = FILES.map(|file| Path::new(file).metadata().and_then(|meta| meta.modified()).ok());
        let mut current = lock(&self.current);
        if let Some(current) = current.as_ref().filter(|current| current.changed == changed) {
            return Ok(Arc::clone(&current.resolver));
        }
        let resolver = Arc::new(self.build()?);
        *current = Some(Current { changed, resolver: Arc::clone(&resolver) });
        Ok(resolver)
    }

    fn build(&self) -> Result<TokioResolver, NetError> {
        let mut builder = match &self.given {
            Some((config, options)) => {
                TokioResolver::builder_with_config(config.clone(), TokioRuntimeProvider::default())
                    .with_options(options.clone())
            }
            // Without a file the name server is on this machine, as resolv.conf(5) says.
            None => TokioResolver::builder_tokio().unwrap_or_else(|error| {
                let own = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
                tracing::warn!("{} can't be used ({error}); names are asked for at {}", FILES[0], own.ip);
                let config = ResolverConfig::from_parts(None, Vec::new(), vec![own]);
                TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            }),
        };
        let options = builder.options_mut();
        // Each address is tried in turn. Ways over IPv6 are broken more often.
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        // What is known is kept with its origin.
        options.cache_size = 0;
        builder.build()
    }
}

/// What a failed look-up comes to. Where no socket can be opened it may say that there is no server.
fn unresolved(name: &str, error: &NetError) -> NotConnected {
    let why = match error {
        // Without an address to ask a server from there is no port either, which is no lack of ours.
        NetError::Io(error) => match Shortage::in_error(error).filter(|short| short.of != Resource::Ports) {
            Some(shortage) => return NotConnected::Short(shortage),
            None => describe(error),
        },
        NetError::Timeout => "its name server does not answer".to_owned(),
        NetError::Dns(DnsError::NoRecordsFound(none)) if none.response_code == ResponseCode::NXDomain => {
            "there is no such name".to_owned()
        }
        NetError::Dns(DnsError::NoRecordsFound(_)) => "it has no address".to_owned(),
        NetError::Dns(DnsError::ResponseCode(code)) => format!("its name server says `{code}`"),
        other => other.to_string(),
    };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).err();
    match socket.as_ref().and_then(Shortage::in_error) {
        Some(shortage) => NotConnected::Short(shortage),
        None => NotConnected::Refused(format!("the name `{name}` can't be resolved: {why}")),
    }
}

#[cfg(test)]
mod tests;
