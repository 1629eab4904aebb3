//! Opens connections: name look-up, TCP, TLS. Nothing here has sent a request yet.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::Host;

use super::DeliveryError;
use super::connection::{Connection, Stream};
use super::target::{AddressRule, Origin};
use crate::clock::Stopwatch;

/// A looked-up name is believed for this long. Deliveries open few connections, but hundreds at once.
const KNOWN_FOR: Duration = Duration::from_secs(10);

/// A failed look-up is believed for this long, so that a queue of tries does not become a queue of look-ups.
const UNKNOWN_FOR: Duration = Duration::from_secs(1);

/// Addresses of one name that are tried, at most.
const ADDRESSES_MAX: usize = 8;

/// Opens connections to any origin.
pub(super) struct Connector {
    tls: TlsConnector,
    rule: AddressRule,
    watch: Stopwatch,
}

impl Connector {
    /// Trusts Mozilla's authorities, the system's, and those of `ca_file`.
    pub(super) fn new(
        ca_file: Option<&Path>,
        rule: AddressRule,
        watch: Stopwatch,
    ) -> Result<Connector, DeliveryError> {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        // A machine without a store of its own, or with an odd certificate in it, is no reason not to start.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = ca_file {
            add_file(&mut roots, path)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| DeliveryError::Tls(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Connector { tls: TlsConnector::from(Arc::new(config)), rule, watch })
    }

    /// Opens a connection to one of the origin's addresses, tried in turn. The caller has a deadline,
    /// `within` from the start of the try; of it each address but the last gets an equal share.
    ///
    /// # Errors
    /// A few words on why none could be opened.
    pub(super) async fn connect(
        &self,
        origin: &Origin,
        names: &Arc<Names>,
        within: Duration,
    ) -> Result<Connection, String> {
        let addresses = match &origin.host {
            Host::Ipv4(v4) => vec![SocketAddr::new(IpAddr::V4(*v4), origin.port)],
            Host::Ipv6(v6) => vec![SocketAddr::new(IpAddr::V6(*v6), origin.port)],
            Host::Domain(name) => names.resolve(name, origin.port, &self.watch).await?,
        };
        let share = within / u32::try_from(addresses.len()).unwrap_or(1).max(1);
        let last = addresses.len().saturating_sub(1);
        let mut why = "the name has no address".to_owned();
        for (i, address) in addresses.into_iter().enumerate() {
            let opened = if i == last {
                self.open(address).await
            } else {
                tokio::time::timeout(share, self.open(address))
                    .await
                    .unwrap_or_else(|_| Err(format!("{} does not answer", address.ip())))
            };
            match opened {
                Ok(stream) => return self.greet(stream, origin).await,
                Err(error) => why = error,
            }
        }
        Err(why)
    }

    async fn open(&self, address: SocketAddr) -> Result<TcpStream, String> {
        self.rule.check(address.ip())?;
        let stream = TcpStream::connect(address).await.map_err(|error| words(&error))?;
        stream.set_nodelay(true).map_err(|error| words(&error))?;
        Ok(stream)
    }

    async fn greet(&self, stream: TcpStream, origin: &Origin) -> Result<Connection, String> {
        let stream = if origin.tls {
            let name = match &origin.host {
                Host::Ipv4(v4) => ServerName::from(*v4),
                Host::Ipv6(v6) => ServerName::from(*v6),
                Host::Domain(name) => {
                    ServerName::try_from(name.clone()).map_err(|_| format!("`{name}` is no name for TLS"))?
                }
            };
            let stream = self.tls.connect(name, stream).await;
            Stream::Tls(Box::new(stream.map_err(|error| format!("TLS failed: {}", words(&error)))?))
        } else {
            Stream::Plain(stream)
        };
        Connection::open(stream).await.map_err(|error| error.to_string())
    }
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), DeliveryError> {
    let wrong = |why: String| DeliveryError::CaFile { path: path.to_owned(), why };
    let mut count = 0;
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))? {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        count += 1;
    }
    if count == 0 {
        return Err(wrong("no certificate in PEM form".to_owned()));
    }
    Ok(())
}

/// An I/O error in plain words, without the number that the system gives it.
pub(super) fn words(error: &io::Error) -> String {
    let text = match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::ConnectionReset => "connection reset".to_owned(),
        io::ErrorKind::TimedOut => "connection timed out".to_owned(),
        io::ErrorKind::UnexpectedEof => "connection closed".to_owned(),
        _ => error.to_string(),
    };
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// The addresses of one origin's name.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: Mutex<Option<Known>>,
    /// Held during a look-up. A look-up occupies a thread until the system gives up on it, so there
    /// is never more than one for a name, however many tries have given up waiting for it.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Debug)]
struct Known {
    until: Duration,
    addresses: Result<Vec<SocketAddr>, String>,
}

impl Names {
    async fn resolve(
        self: &Arc<Self>,
        name: &str,
        port: u16,
        watch: &Stopwatch,
    ) -> Result<Vec<SocketAddr>, String> {
        if let Some(addresses) = self.fresh(watch) {
            return addresses;
        }
        let turn = Arc::clone(&self.turn).lock_owned().await;
        if let Some(addresses) = self.fresh(watch) {
            return addresses;
        }
        let (names, name, watch) = (Arc::clone(self), name.to_owned(), watch.clone());
        let look_up = tokio::spawn(async move {
            let addresses = match tokio::net::lookup_host((name.as_str(), port)).await {
                Ok(found) => Ok(found.take(ADDRESSES_MAX).collect()),
                Err(error) => Err(format!("the name `{name}` can't be resolved: {}", reason(&error))),
            };
            let wait = if addresses.is_ok() { KNOWN_FOR } else { UNKNOWN_FOR };
            let known = Known { until: watch.elapsed() + wait, addresses: addresses.clone() };
            *names.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
            drop(turn);
            addresses
        });
        look_up.await.unwrap_or_else(|_| Err("the name look-up was stopped".to_owned()))
    }

    fn fresh(&self, watch: &Stopwatch) -> Option<Result<Vec<SocketAddr>, String>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.as_ref().filter(|known| watch.elapsed() < known.until)?;
        Some(known.addresses.clone())
    }
}

/// What the resolver says, without the words that every such error begins with.
fn reason(error: &io::Error) -> String {
    let text = words(error);
    match text.split_once(": ") {
        Some((_, reason)) => reason.to_owned(),
        None => text,
    }
}
