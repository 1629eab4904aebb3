//! What of a URL or an address may be shown: never a password, however the text is malformed.
//!
//! A parser is no help here: a password with a `/` in it ends the host for one and not for another. So a part
//! is shown only when it can't be anything else, and hidden otherwise.

/// What stands where something is hidden.
pub const HIDDEN: &str = "(hidden)";

/// Characters of a scheme that is shown, at most: `postgresql` and `redis+unix` have ten, a password more.
const SCHEME_MAX: usize = 12;

/// A URL without user, password, query and fragment; only its scheme, when those can't be told apart.
pub fn url(text: &str) -> String {
    let Some((scheme, rest)) = split(text) else { return HIDDEN.to_owned() };
    shown(scheme, rest).unwrap_or_else(|| format!("{scheme}://{HIDDEN}"))
}

/// The scheme of a URL that nobody understands.
pub fn scheme(text: &str) -> String {
    split(text).map_or_else(|| HIDDEN.to_owned(), |(scheme, _)| format!("{scheme}://{HIDDEN}"))
}

/// A host, or `host:port,host:port`; nothing of it, when it holds anything else.
pub fn addresses(text: &str) -> String {
    let plain = text.split(',').all(|address| is_address(address.trim()));
    if plain { text.to_owned() } else { HIDDEN.to_owned() }
}

/// Scheme and rest of what looks like a URL.
fn split(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    let is_scheme = scheme.len() <= SCHEME_MAX
        && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(legal);
    is_scheme.then_some((scheme, rest))
}

fn shown(scheme: &str, rest: &str) -> Option<String> {
    if scheme == "sqlite" {
        // A path: nobody logs in to it.
        return (!rest.contains(['@', '?', '=', ':', '#', '&'])).then(|| format!("{scheme}://{rest}"));
    }
    let authority_end = rest.find(['/', '\\', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(authority_end);
    // Behind the authority it may end a password that has a delimiter in it.
    if tail.contains('@') {
        return None;
    }
    let (user, address) = authority.rsplit_once('@').map_or((None, authority), |(user, at)| (Some(user), at));
    // A user without a password: what follows the `@` may be the rest of one.
    if user.is_some_and(|user| user.ends_with(':')) || !address.split(',').all(is_address) {
        return None;
    }
    let user = if user.is_some() { format!("{HIDDEN}@") } else { String::new() };
    let path_end = tail.find(['?', '#']).unwrap_or(tail.len());
    let (path, rest) = tail.split_at(path_end);
    // A query whose `?` is missing.
    if path.contains(['=', '&', ';', ':', '\\']) || path.contains(char::is_whitespace) {
        return None;
    }
    let rest = rest.chars().next().map_or(String::new(), |mark| format!("{mark}{HIDDEN}"));
    Some(format!("{scheme}://{user}{address}{path}{rest}"))
}

/// Whether this is a host name or an IP address, with or without a port.
fn is_address(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => {
            let is_v6 = host.parse::<std::net::Ipv6Addr>().is_ok();
            (
                is_v6.then_some(host),
                if port.is_empty() { None } else { Some(port.strip_prefix(':').unwrap_or(port)) },
            )
        }
        None if text.parse::<std::net::Ipv6Addr>().is_ok() => (Some(text), None),
        None => match text.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(text), None),
        },
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    host.is_some_and(|host| !host.is_empty() && host.chars().all(legal))
        && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_shown_only_when_it_can_be_nothing_else() {
        for (text, shown) in [
            ("postgres://db", "postgres://db"),
            ("postgres://a:1,b:2/x", "postgres://a:1,b:2/x"),
            ("http://[::1]:81/a/b", "http://[::1]:81/a/b"),
            ("http://u:p@h/a", "http://(hidden)@h/a"),
            ("http://p@h", "http://(hidden)@h"),
            ("http://u:@p@h", "http://(hidden)@h"),
            ("http://u:@h", "http://(hidden)"),
            ("http://u:p", "http://(hidden)"),
            ("http://u:1\\p@h", "http://(hidden)"),
            ("http://h/p=q", "http://(hidden)"),
            ("http://h?p", "http://h?(hidden)"),
            ("http://h:/p", "http://(hidden)"),
            ("http://[p]/", "http://(hidden)"),
            ("http:/u:p@h", "(hidden)"),
            ("abcdefghijklm://h", "(hidden)"),
            ("u:p://h", "(hidden)"),
            ("", "(hidden)"),
        ] {
            assert_eq!(url(text), shown, "{text}");
        }
        for (text, shown) in [
            ("h", "h"),
            ("h:1, ::1,[::1]:2", "h:1, ::1,[::1]:2"),
            ("u:p@h:1", "(hidden)"),
            ("u:p", "(hidden)"),
            ("h=x", "(hidden)"),
            ("", "(hidden)"),
        ] {
            assert_eq!(addresses(text), shown, "{text}");
        }
    }
}
