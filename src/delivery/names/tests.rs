//! Tests with a name server of their own.

use std::collections::HashSet;

use hickory_resolver::config::ConnectionConfig;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::*;

/// Response codes of RFC 1035, section 4.1.1.
const NO_ERROR: u8 = 0;
const NO_SUCH_NAME: u8 = 3;
const REFUSED: u8 = 5;

/// Starts a name server: what it answers depends on how a name begins, and names that begin with `silent` have no
/// answer. The other half says how many of those were asked for.
async fn name_server() -> (Resolver, watch::Receiver<usize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let (tell, told) = watch::channel(0);
    tokio::spawn(async move {
        let (mut query, mut silent) = ([0; 512], HashSet::new());
        while let Ok((length, from)) = socket.recv_from(&mut query).await {
            let question = question(&query[..length]);
            let name = String::from_utf8_lossy(&question[1..=question[0].into()]).to_ascii_lowercase();
            let is_for_ipv4 = question[question.len() - 3] == 1;
            let (code, address) = match name.as_str() {
                "healthy" => (NO_ERROR, Some([192, 0, 2, 7]).filter(|_| is_for_ipv4)),
                "empty" => (NO_ERROR, None),
                "refused" => (REFUSED, None),
                "none" => (NO_SUCH_NAME, None),
                _ => {
                    silent.insert(name);
                    tell.send_replace(silent.len());
                    continue;
                }
            };
            socket.send_to(&answer(&query, question, code, address), from).await.unwrap();
        }
    });
    let mut udp = ConnectionConfig::udp();
    udp.port = address.port();
    let server = NameServerConfig::new(address.ip(), true, vec![udp]);
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    let mut options = ResolverOpts::default();
    (options.timeout, options.attempts) = (Duration::from_secs(30), 1);
    (Resolver { given: Some((config, options)), current: Mutex::default() }, told)
}

/// The question of a query: its name, label by label, then type and class.
fn question(query: &[u8]) -> &[u8] {
    let mut end = 12;
    while query[end] > 0 {
        end += 1 + usize::from(query[end]);
    }
    &query[12..end + 5]
}

fn answer(query: &[u8], question: &[u8], code: u8, address: Option<[u8; 4]>) -> Vec<u8> {
    let mut answer =
        vec![query[0], query[1], 0x81, 0x80 | code, 0, 1, 0, address.is_some().into(), 0, 0, 0, 0];
    answer.extend(question);
    if let Some(address) = address {
        // The name of the question, an IPv4 address of the internet, for 60 s.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address);
    }
    answer
}

#[test]
fn names_whose_server_is_silent_keep_nobody_waiting() {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // A look-up that took the thread would keep the next.
    let runtime = runtime.enable_all().max_blocking_threads(1).build().unwrap();
    runtime.block_on(beside_silent_names());
}

async fn beside_silent_names() {
    const SILENT: usize = 300;
    let (resolver, mut silent) = name_server().await;
    let resolver = Arc::new(resolver);
    let mut look_ups = JoinSet::new();
    for i in 0..SILENT {
        let resolver = Arc::clone(&resolver);
        look_ups.spawn(async move { resolver.look_up(&format!("silent-{i}.example."), 80).await });
    }
    silent.wait_for(|count| *count == SILENT).await.unwrap();
    let found = resolver.look_up("healthy.example.", 8_080).await.unwrap();
    assert_eq!(found, [([192, 0, 2, 7], 8_080).into()]);
    tokio::task::spawn_blocking(|| ()).await.unwrap();
    assert!(look_ups.try_join_next().is_none(), "the others wait on");
}

#[tokio::test]
async fn a_failed_look_up_says_why() {
    let (resolver, _) = name_server().await;
    for (name, why) in [
        ("none.example.", "there is no such name"),
        ("empty.example.", "it has no address"),
        ("refused.example.", "its name server says `Query Refused`"),
    ] {
        let said = resolver.look_up(name, 80).await.unwrap_err();
        assert_eq!(said, NotConnected::Refused(format!("the name `{name}` can't be resolved: {why}")));
    }
    let late = unresolved("late.example", &NetError::Timeout).reason();
    assert_eq!(late, "the name `late.example` can't be resolved: its name server does not answer");
    let error = |code| NetError::from(std::io::Error::from_raw_os_error(code));
    let short = |code| match unresolved("x", &error(code)) {
        NotConnected::Short(shortage) => Some(shortage.of),
        NotConnected::Refused(_) => None,
    };
    // No more files; no address to ask from; nobody there.
    assert_eq!([24, 99, 111].map(short), [Some(Resource::Descriptors), None, None]);
}

#[tokio::test]
async fn the_systems_own_names_are_known_and_its_files_are_read_again_when_they_change() {
    let resolver = Resolver::of_system();
    let found = resolver.look_up("localhost", 80).await.unwrap();
    assert!(found.contains(&([127, 0, 0, 1], 80).into()), "{found:?}");
    let first = resolver.current().unwrap();
    assert!(Arc::ptr_eq(&first, &resolver.current().unwrap()));
    resolver.current.lock().unwrap().as_mut().unwrap().changed = [Some(SystemTime::UNIX_EPOCH); 2];
    assert!(!Arc::ptr_eq(&first, &resolver.current().unwrap()));
}
