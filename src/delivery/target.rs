//! Where a request goes: an endpoint's URL, taken apart once, and the rule on addresses.

use std::net::{IpAddr, Ipv6Addr};

use hyper::Uri;
use hyper::header::HeaderValue;
use url::{Host, Position, Url};

/// What connections are kept by: requests to one origin may share them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    pub(super) tls: bool,
    pub(super) host: Host<String>,
    pub(super) port: u16,
}

/// An endpoint's URL as a request needs it.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) origin: Origin,
    /// The value of `host`.
    pub(super) host: HeaderValue,
    /// Path and query.
    pub(super) path: Uri,
}

impl Target {
    /// Takes a URL apart.
    ///
    /// # Errors
    /// One sentence on why no request can go there. It never repeats a password.
    pub(super) fn parse(text: &str) -> Result<Target, String> {
        let url = Url::parse(text).map_err(|error| format!("the URL can't be read: {error}"))?;
        let tls = match url.scheme() {
            "http" => false,
            "https" => true,
            // Without the scheme: in `user:password@host` it is the user.
            _ => return Err("the URL's scheme is neither http nor https".to_owned()),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err("the URL carries a user name or password, which is not sent".to_owned());
        }
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            return Err("the URL names no host".to_owned());
        };
        if port == 0 {
            return Err("the URL's port is 0, where nothing can listen".to_owned());
        }
        let header = &url[Position::BeforeHost..Position::AfterPort];
        Ok(Target {
            origin: Origin { tls, host: host.to_owned(), port },
            host: HeaderValue::try_from(header)
                .map_err(|_| "the URL's host is no header value".to_owned())?,
            path: url[Position::BeforePath..Position::AfterQuery]
                .parse()
                .map_err(|error| format!("the URL's path can't be sent: {error}"))?,
        })
    }
}

/// Which addresses may be connected to. It is asked about every address on every connect, also when
/// the URL names one literally, because a name may point elsewhere tomorrow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AddressRule {
    pub(super) refuse_link_local: bool,
}

impl AddressRule {
    /// Whether `address` may be connected to.
    ///
    /// # Errors
    /// A few words on why not.
    pub(super) fn check(self, address: IpAddr) -> Result<(), String> {
        // An IPv4 address may come dressed as IPv6.
        let bare = address.to_canonical();
        let link_local = match bare {
            IpAddr::V4(v4) => v4.is_link_local(),
            // The second is where a cloud keeps its machines' credentials, as 169.254.169.254 is.
            IpAddr::V6(v6) => {
                v6.is_unicast_link_local() || v6 == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)
            }
        };
        if self.refuse_link_local && link_local {
            return Err(format!("the address {bare} is link-local, which is not allowed"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        for (url, tls, host, port, path) in [
            ("http://localhost:3000", false, "localhost:3000", 3000, "/"),
            ("https://Example.ORG/hook?a=b#c", true, "example.org", 443, "/hook?a=b"),
            ("http://[::1]:81/x y", false, "[::1]:81", 81, "/x%20y"),
            ("http://2130706433/", false, "127.0.0.1", 80, "/"),
        ] {
            let target = Target::parse(url).unwrap();
            assert_eq!(target.origin.tls, tls, "{url}");
            assert_eq!(target.origin.port, port, "{url}");
            assert_eq!(target.host, host, "{url}");
            assert_eq!(target.path.to_string(), path, "{url}");
        }
    }

    #[test]
    fn what_can_not_be_requested_is_explained() {
        for (url, why) in [
            ("", "can't be read"),
            ("localhost:3000", "scheme is neither http"),
            ("ftp://example.org/", "scheme is neither http"),
            ("file:///etc/passwd", "scheme is neither http"),
            ("secret:x@example.org", "scheme is neither http"),
            ("http://user:secret@example.org/", "user name"),
            ("http://", "can't be read"),
            ("http://example.org:99999/", "can't be read"),
            ("http://example.org:0/", "port"),
        ] {
            let error = Target::parse(url).unwrap_err();
            assert!(error.contains(why), "{url}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn link_local_addresses_are_refused_only_when_asked_for() {
        let strict = AddressRule { refuse_link_local: true };
        for address in ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "fd00:ec2::254"] {
            let address = address.parse().unwrap();
            assert!(strict.check(address).is_err(), "{address}");
            assert!(AddressRule::default().check(address).is_ok(), "{address}");
        }
        for address in ["127.0.0.1", "::1", "10.0.0.1", "192.0.2.1", "2001:db8::1"] {
            assert!(strict.check(address.parse().unwrap()).is_ok(), "{address}");
        }
    }
}
