//! Opens connections: TCP and TLS, after a name was looked up (`names`). Nothing here has sent a request yet.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, OptionFuture};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::Host;

use super::DeliveryError;
use super::budget::Permit;
use super::connection::{Connection, Stream};
use super::names::{AddressCache, Resolver};
use super::target::{AddressRule, Origin};
use crate::clock::Stopwatch;
use crate::shortage::{Resource, Shortage};

/// Opens a TCP connection; tests have one that fails as they say.
pub(super) type Dial = Box<dyn Fn(SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>> + Send + Sync>;

/// How long an address has before the next is tried beside it: as RFC 8305, section 8, recommends.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// Opens connections to any origin.
pub(super) struct Connector {
    tls: TlsConnector,
    rule: AddressRule,
    resolver: Arc<Resolver>,
    watch: Stopwatch,
    dial: Dial,
}

/// Why there is no connection. Nothing was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotConnected {
    /// This process lacks what a connection needs: it says nothing about the receiver.
    Short(Shortage),
    /// The receiver, its name or the way to it: a few words.
    Refused(String),
}

impl NotConnected {
    /// Why, in a sentence.
    pub(super) fn reason(self) -> String {
        match self {
            NotConnected::Short(shortage) => shortage.why,
            NotConnected::Refused(why) => why,
        }
    }

    /// What an error of the system comes to; `describe` tells it when it is the receiver's.
    fn new(error: &io::Error, describe: impl FnOnce(&io::Error) -> String) -> NotConnected {
        match Shortage::in_error(error) {
            Some(shortage) => NotConnected::Short(shortage),
            None => NotConnected::Refused(describe(error)),
        }
    }
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
        let dial: Dial = Box::new(|address| Box::pin(TcpStream::connect(address)));
        let (tls, resolver) = (TlsConnector::from(Arc::new(config)), Arc::new(Resolver::of_system()));
        Ok(Connector { tls, rule, resolver, watch, dial })
    }

    /// The same, with another way to open a TCP connection.
    #[cfg(test)]
    pub(super) fn dialling(self, dial: Dial) -> Connector {
        Connector { dial, ..self }
    }

    /// Opens a connection to one of the origin's addresses; the caller has a deadline.
    /// `permit` is the connection's part of what may be open.
    ///
    /// # Errors
    /// Why none could be opened. An address that could not be tried counts for more than one that refused.
    pub(super) async fn connect(
        &self,
        origin: &Origin,
        names: &Arc<AddressCache>,
        permit: Arc<Permit>,
    ) -> Result<Connection, NotConnected> {
        let addresses = match &origin.host {
            Host::Ipv4(v4) => vec![SocketAddr::new(IpAddr::V4(*v4), origin.port)],
            Host::Ipv6(v6) => vec![SocketAddr::new(IpAddr::V6(*v6), origin.port)],
            Host::Domain(name) => {
                names.resolve(&self.resolver, name, origin.port, &self.watch, &permit).await?
            }
        };
        let stream = self.open_one(addresses).await?;
        self.handshake(stream, origin, permit).await
    }

    /// Opens the first of these addresses that answers. Each is tried when the one before has failed, or has not answered
    /// for a moment: that goes on beside it, and one that is older still is given up.
    async fn open_one(&self, addresses: Vec<SocketAddr>) -> Result<TcpStream, NotConnected> {
        let mut why = NotConnected::Refused("the name has no address".to_owned());
        let mut left = addresses.into_iter();
        let (mut older, mut newer) = (None, left.next().map(|address| Box::pin(self.open(address))));
        while newer.is_some() {
            let has_next = !left.as_slice().is_empty();
            let opened = tokio::select! {
                biased;
                Some(opened) = OptionFuture::from(older.as_mut()) => { older = None; Some(opened) }
                Some(opened) = OptionFuture::from(newer.as_mut()) => { newer = older.take(); Some(opened) }
                () = tokio::time::sleep(NEXT_ADDRESS), if has_next => None,
            };
            match opened {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(_)) if matches!(why, NotConnected::Short(_)) => {}
                Some(Err(error)) => why = error,
                None => {}
            }
            if let Some(address) = left.next() {
                older = newer.take();
                newer = Some(Box::pin(self.open(address)));
            }
        }
        Err(why)
    }

    async fn open(&self, address: SocketAddr) -> Result<TcpStream, NotConnected> {
        self.rule.check(address.ip()).map_err(NotConnected::Refused)?;
        let stream =
            (self.dial)(address).await.map_err(|error| match NotConnected::new(&error, describe) {
                // Said as well when there is no port because there is no address.
                NotConnected::Short(Shortage { of: Resource::Ports, .. }) if !has_source_address(address) => {
                    NotConnected::Refused(describe(&error))
                }
                why => why,
            })?;
        stream.set_nodelay(true).map_err(|error| NotConnected::new(&error, describe))?;
        Ok(stream)
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        origin: &Origin,
        permit: Arc<Permit>,
    ) -> Result<Connection, NotConnected> {
        let stream = if origin.tls {
            let name = match &origin.host {
                Host::Ipv4(v4) => ServerName::from(*v4),
                Host::Ipv6(v6) => ServerName::from(*v6),
                Host::Domain(name) => ServerName::try_from(name.clone())
                    .map_err(|_| NotConnected::Refused(format!("`{name}` is no name for TLS")))?,
            };
            let stream = self.tls.connect(name, stream).await;
            let failed = |error: &io::Error| format!("TLS failed: {}", describe(error));
            Stream::Tls(Box::new(stream.map_err(|error| NotConnected::new(&error, failed))?))
        } else {
            Stream::Plain(stream)
        };
        let opened = Connection::open(stream, permit).await;
        opened.map_err(|error| NotConnected::Refused(error.to_string()))
    }
}

/// Whether this machine has an address from which `to` can be reached: one without IPv6 has none for `::1`.
/// Datagram sockets have ports of their own, and to connect one sends nothing.
fn has_source_address(to: SocketAddr) -> bool {
    let any = match to {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let connected = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(to));
    let none = [io::ErrorKind::AddrNotAvailable, io::ErrorKind::NetworkUnreachable];
    connected.err().is_none_or(|error| !none.contains(&error.kind()))
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

/// An I/O error in plain describe, without the number that the system gives it.
pub(super) fn describe(error: &io::Error) -> String {
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
