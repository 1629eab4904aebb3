//! TLS with an authority of our own.

use std::io::Write;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::receiver::Receiver;
use super::*;

/// An authority, and the file that names it.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: tempfile::NamedTempFile,
}

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(issuer.pem().as_bytes()).unwrap();
    Authority { issuer, file }
}

impl Authority {
    fn options(&self) -> DeliveryOptions {
        DeliveryOptions { ca_file: Some(self.file.path().to_owned()), ..DeliveryOptions::default() }
    }

    /// Answers every request on every connection with 200; returns its port and what it counts.
    async fn serve(&self, name: &str) -> (u16, tokio::sync::watch::Receiver<usize>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (greeted, count) = tokio::sync::watch::channel(0);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    continue;
                };
                greeted.send_modify(|count| *count += 1);
                tokio::spawn(async move {
                    let mut bytes = vec![0; 4096];
                    while matches!(stream.read(&mut bytes).await, Ok(1..)) {
                        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                    }
                });
            }
        });
        (port, count)
    }
}

#[tokio::test]
async fn a_known_authority_is_trusted() {
    let authority = authority();
    let (port, count) = authority.serve("localhost").await;
    let delivery = with_options(Clock::system(), authority.options());
    for _ in 0..3 {
        let outcome = deliver(&delivery, &format!("https://localhost:{port}/")).await;
        assert_eq!((outcome.class, outcome.answer.as_str()), (Class::Accepted, "ok"), "{outcome:?}");
    }
    assert_eq!(*count.borrow(), 1, "the connection is kept");
}

#[tokio::test]
async fn another_name_is_refused() {
    let authority = authority();
    let (port, _) = authority.serve("other.example").await;
    let delivery = with_options(Clock::system(), authority.options());
    for host in ["localhost", "127.0.0.1"] {
        let outcome = deliver(&delivery, &format!("https://{host}:{port}/")).await;
        assert_eq!(outcome.class, Class::Refused);
        assert!(outcome.error.as_ref().unwrap().starts_with("TLS failed: "), "{outcome:?}");
    }
    assert_eq!(idle(&delivery), 0);
}

#[tokio::test]
async fn an_unknown_authority_is_refused() {
    let (port, _) = authority().serve("localhost").await;
    let outcome = deliver(&delivery(), &format!("https://localhost:{port}/")).await;
    assert_eq!(outcome.class, Class::Refused);
    assert!(outcome.error.as_ref().unwrap().starts_with("TLS failed: "), "{outcome:?}");
}

#[tokio::test]
async fn a_plain_receiver_is_refused() {
    let receiver = Receiver::start(|mut wire| async move {
        let _ = wire.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await;
        wire.until_closed().await;
    })
    .await;
    let outcome = deliver(&delivery(), &format!("https://127.0.0.1:{}/", receiver.port)).await;
    assert_eq!(outcome.class, Class::Refused, "{outcome:?}");
    receiver.until_open(0).await;
}

#[tokio::test]
async fn a_handshake_that_hangs_is_refused_at_the_deadline() {
    let receiver = Receiver::start(|mut wire| async move { wire.until_closed().await }).await;
    let outcome = deliver_soon(&delivery(), &format!("https://127.0.0.1:{}/", receiver.port)).await;
    assert_eq!(outcome.class, Class::Refused);
    assert_eq!(outcome.error.as_deref(), Some("no connection within 300ms"));
    receiver.until_open(0).await;
}

#[tokio::test]
async fn plain_http_to_a_tls_port_is_no_success() {
    let (port, _) = authority().serve("localhost").await;
    let outcome = deliver(&delivery(), &format!("http://localhost:{port}/")).await;
    assert!(matches!(outcome.class, Class::BadAnswer | Class::Reset), "{outcome:?}");
}

#[tokio::test]
async fn a_receiver_is_reached_without_a_request() {
    let authority = authority();
    let (port, mut greeted) = authority.serve("localhost").await;
    let delivery = with_options(Clock::system(), authority.options());
    let url = format!("https://localhost:{port}/hook");
    delivery.reach(&url, 10 * SLACK).await.unwrap();
    greeted.wait_for(|count| *count == 1).await.unwrap();
    let silent = Receiver::start(|mut wire| async move { wire.until_closed().await }).await;
    let plain = format!("127.0.0.1:{}", silent.port);
    delivery.reach(&format!("http://{plain}/"), 10 * SLACK).await.unwrap();
    for (url, within, why) in [
        (url.replace("localhost", "127.0.0.1"), 10 * SLACK, "TLS failed"),
        (format!("https://{plain}/"), DEADLINE, "no connection within 300ms"),
        ("ftp://example.org/".to_owned(), DEADLINE, "scheme"),
        ("http://127.0.0.1:1/".to_owned(), 10 * SLACK, "connection refused"),
    ] {
        let error = delivery.reach(&url, within).await.unwrap_err();
        assert!(error.contains(why), "{url}: {error}");
    }
    silent.until_open(0).await;
}

#[test]
fn a_bad_file_of_authorities_stops_the_start() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let mut broken = tempfile::NamedTempFile::new().unwrap();
    broken.write_all(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let missing = PathBuf::from("/nowhere/ca.pem");
    for path in [empty.path().to_owned(), broken.path().to_owned(), missing] {
        let options = DeliveryOptions { ca_file: Some(path.clone()), ..DeliveryOptions::default() };
        let error = Delivery::new(Clock::system(), Uuid::nil(), options).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}
