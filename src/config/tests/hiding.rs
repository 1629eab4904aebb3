//! Whatever is wrong with a URL: nobody sees the password in it.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

/// Settings into which somebody may put an address with a password.
const ADDRESSES: [&str; 9] = [
    "DATABASE_URL",
    "REDIS_URL",
    "REQUEST_URL",
    "AMS_URL",
    "KAFKA_BROKERS",
    "DB_HOST",
    "REDIS_HOST",
    "HOST",
    "AMS_HOSTS",
];

/// Everything that is said of these settings.
fn said(values: &[(&str, &str)]) -> String {
    let mut said = String::new();
    let raw = raw(values);
    for role in [Role::Tool, Role::Up] {
        said.extend(raw.explain(role).into_iter().map(|(_, shown, _)| shown + "\n"));
        said.extend(Config::new(&raw, role).err().map(|error| error.to_string() + "\n"));
    }
    said
}

#[test]
fn what_is_no_secret_is_shown() {
    for (name, value, shown) in [
        ("DATABASE_URL", "postgres://scott:tiger@db:5432/x", "postgres://(hidden)@db:5432/x"),
        ("DATABASE_URL", "postgres://db/x?password=tiger&sslmode=require", "postgres://db/x?(hidden)"),
        ("DATABASE_URL", "sqlite://ams-data/ams.db", "sqlite://ams-data/ams.db"),
        ("DATABASE_URL", "sqlite:///var/lib/ams.db", "sqlite:///var/lib/ams.db"),
        ("DATABASE_URL", "host=db user=scott password=tiger", "(hidden)"),
        ("DATABASE_URL", "scott:tiger@db/x", "(hidden)"),
        ("DATABASE_URL", "postgres://scott:ti/ger@db/x", "postgres://(hidden)"),
        ("DATABASE_URL", "postgres://scott:12/34@db/x", "postgres://(hidden)"),
        ("DATABASE_URL", "postgres://scott:ti@ger@db/x", "postgres://(hidden)@db/x"),
        ("REDIS_URL", "rediss://:tiger@[::1]:6379/0", "rediss://(hidden)@[::1]:6379/0"),
        ("REQUEST_URL", "https://example.org:81/hook?token=tiger", "https://example.org:81/hook?(hidden)"),
        ("REQUEST_URL", "https://example.org/#tiger", "https://example.org/#(hidden)"),
        ("AMS_URL", "http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("KAFKA_BROKERS", "a.b:9092,[::1]:9093", "a.b:9092,[::1]:9093"),
        ("KAFKA_BROKERS", "kafka", "kafka"),
        ("KAFKA_BROKERS", "me:tiger@kafka:9092", "(hidden)"),
        ("KAFKA_BROKERS", "sasl_ssl://me:tiger@kafka:9092", "(hidden)"),
        ("DB_HOST", "postgres://scott:tiger@db/x", "(hidden)"),
        ("HOST", "0.0.0.0", "0.0.0.0"),
    ] {
        let explained = raw(&[(name, value)]).explain(Role::Up);
        let (_, is, _) = explained.iter().find(|(setting, ..)| setting.name == name).unwrap();
        assert_eq!(is, shown, "{name}={value}");
    }
}

#[test]
fn a_refused_url_is_told_by_its_scheme_alone() {
    for (name, value, shown) in [
        ("DATABASE_URL", "postgre://u:pa/ss@h/db", "`postgre://(hidden)`"),
        ("DATABASE_URL", "user:pw@host/db", "`(hidden)`"),
        ("REQUEST_URL", "http://user:pw@host/", "`http://(hidden)`"),
        ("AMS_URL", "https://user@host/", "`https://(hidden)`"),
        ("AMS_URL", "user:pw@host", "`(hidden)`"),
        ("REDIS_URL", "redis://u:12/34@h/0", "`redis://(hidden)`"),
        ("REDIS_URL", "http://:pw@host", "`http://(hidden)`"),
    ] {
        let refusal = refusal(Role::Up, &[(name, value)]);
        assert!(refusal.starts_with(&format!("{name} is {shown}, which ")), "{refusal}");
    }
}

#[test]
fn neither_the_file_nor_a_broken_variable_tells_a_secret() {
    for file in ["db_password = \"tiger", "db_password = tiger", "database_url = 'postgres://u:tiger@h'x"] {
        let file = format!("port = 1\n{file}\n");
        let refused = Raw::combine(&BTreeMap::new(), |_| None, Some(&file)).unwrap_err().to_string();
        assert!(refused.contains("line 2") && !refused.contains("tiger"), "{refused}");
    }
    use std::os::unix::ffi::OsStringExt;
    let broken = |name: &str| (name == "DB_PASSWORD").then(|| OsString::from_vec(b"tiger\xff".to_vec()));
    let refused = Raw::combine(&BTreeMap::new(), broken, None).unwrap_err().to_string();
    assert!(refused.contains("DB_PASSWORD is not UTF-8") && !refused.contains("tiger"), "{refused}");
}

/// A URL with `PW` where the password stands.
fn address() -> impl Strategy<Value = String> {
    let scheme = select(vec![
        "postgres",
        "postgresql",
        "redis",
        "rediss",
        "http",
        "https",
        "mysql",
        "sqlite",
        "kafka",
    ]);
    let form = select(vec![
        "S://user:PW@127.0.0.1:5432/db?sslmode=require",
        "S://user:PW@h/",
        "S://:PW@h:6379/0",
        "S://h/db?user=u&password=PW",
        "user:PW@h/db",
        "h1:9092,user:PW@h2:9092",
        "host=h user=u password=PW",
    ]);
    (scheme, form).prop_map(|(scheme, form)| form.replace('S', scheme))
}

const DELIMITERS: &str = "/#?@%:\\&= ,;[]\t.-+'\"";

fn delimiter() -> impl Strategy<Value = char> {
    select(DELIMITERS.chars().collect::<Vec<_>>())
}

/// What happens to a URL that is typed, copied or put together by a template.
#[derive(Clone, Debug)]
enum Damage {
    None,
    Delete(Index),
    Replace(Index, char),
    /// Somewhere, or beside the password, as its first or last characters.
    Insert(Vec<(Index, char)>),
    Around(String, String),
    CutLeft(Index),
    CutRight(Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let place = any::<Index>;
    prop_oneof![
        Just(Damage::None),
        place().prop_map(Damage::Delete),
        (place(), delimiter()).prop_map(|(place, new)| Damage::Replace(place, new)),
        prop::collection::vec((place(), delimiter()), 1..4).prop_map(Damage::Insert),
        ("[/#?@%:&=]{0,2}", "[/#?@%:&=]{0,2}").prop_map(|(before, after)| Damage::Around(before, after)),
        place().prop_map(Damage::CutLeft),
        place().prop_map(Damage::CutRight),
    ]
}

impl Damage {
    /// The damaged text. The password is one character of it, so that no damage is to the password itself.
    fn apply(&self, text: &str) -> String {
        let mut text: Vec<char> = text.replace("PW", "\u{1}").chars().collect();
        let password = |text: &[char], place: usize| text[place] == '\u{1}';
        match self {
            Damage::None => {}
            Damage::Delete(at) => {
                let place = at.index(text.len());
                if !password(&text, place) {
                    text.remove(place);
                }
            }
            Damage::Replace(at, new) => {
                let place = at.index(text.len());
                if !password(&text, place) {
                    text[place] = *new;
                }
            }
            Damage::Insert(all) => {
                for (at, new) in all {
                    text.insert(at.index(text.len() + 1), *new);
                }
            }
            Damage::Around(before, after) => {
                let whole = text.iter().collect::<String>();
                text = whole.replace('\u{1}', &format!("{before}\u{1}{after}")).chars().collect();
            }
            Damage::CutLeft(at) => {
                let place = at.index(text.len());
                text.drain(..place);
            }
            Damage::CutRight(at) => text.truncate(at.index(text.len() + 1)),
        }
        text.into_iter().collect::<String>().replace('\u{1}', "PW")
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_096))]
    #[test]
    fn no_damage_to_a_url_shows_its_password(
        name in select(ADDRESSES.to_vec()),
        address in address(),
        damage in damage(),
        // Long enough that nothing else says it by chance.
        password in "[a-z][A-Za-z0-9]{15,30}",
    ) {
        let value = damage.apply(&address).replace("PW", &password);
        // A bare word is a host's name to everybody.
        prop_assume!(value != password);
        let said = said(&[(name, &value)]);
        prop_assert!(!said.contains(&password), "{name}={value}: {said}");
    }
}
