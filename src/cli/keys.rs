//! `ams keys`: makes, lists and revokes keys of the API, in the store itself, because the first key can't
//! come by an API that asks for one.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde_json::{Value, json};

use super::operator::{option, text, wrong_use};
use super::screen::{Screen, Tone, plain, table};
use super::{json_arg, setting_arg};
use crate::app::{self, AppError};
use crate::clock::{Clock, Timestamp};
use crate::config::{self, Config, SETTINGS, StoreConfig};
use crate::keys;
use crate::store::operate::ApiKey;
use crate::store::{Store, StoreError};

/// Characters of a name that are kept.
const NAME_MAX: usize = 255;

pub(super) fn command() -> Command {
    let name = Arg::new("name").value_name("NAME").required(true).help("who or what will use the key");
    let scope = option("scope", "SCOPES", "what it allows: write (send), read (look), operate (change)");
    let expires = option("expires", "DURATION", "how long it is good, such as 90d; left out: until revoked");
    let id = Arg::new("id").value_name("ID").required(true).help("its first 12 characters, as `list` shows");
    let own = SETTINGS.iter().filter(|setting| {
        setting.name == "DATABASE_URL" || setting.name.starts_with("DB_") || setting.name == "NO_COLOR"
    });
    Command::new("keys")
        .about("keys of the API: make, list, revoke")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .arg(json_arg().global(true))
        .args(own.map(|setting| setting_arg(setting).global(true)))
        .subcommand(
            Command::new("create")
                .about("make a key and show it, this once")
                .arg(name)
                .arg(scope.default_value("write,read").value_delimiter(',').value_parser(keys::SCOPES))
                .arg(expires),
        )
        .subcommand(Command::new("list").about("all keys, without what is secret of them"))
        .subcommand(Command::new("revoke").about("make a key worthless, within a second").arg(id))
}

pub(super) async fn run(config: &Config, matches: &ArgMatches) -> app::Result<ExitCode> {
    let Some((verb, matches)) = matches.subcommand() else { return Ok(ExitCode::from(2)) };
    let screen = Screen::new(config.log.colour, matches.get_flag("json"));
    let now = Clock::system().now();
    // Wrong use is told before anything is opened.
    let wanted = match (verb == "create").then(|| wanted(matches, now)).transpose() {
        Ok(wanted) => wanted,
        Err(error) => return Ok(wrong_use(&error.0)),
    };
    let store = store(&config.store).await?;
    let now = store.time().await.map_err(sentence)?.unwrap_or(now);
    match (verb, wanted) {
        (_, Some((key, whole))) => {
            // It is judged by the store's time, which need not be this machine's.
            let expires_at = key.expires_at.map(|at| now.after(at.since(key.created_at)));
            let key = ApiKey { created_at: now, expires_at, ..key };
            store.put_key(&key).await.map_err(sentence)?;
            let mut shown = shown(&key, now);
            shown["key"] = json!(whole);
            screen.show(&shown, || created(&key, &whole))?;
        }
        ("revoke", _) => {
            let id = text(matches, "id").unwrap_or_default();
            let id = keys::id_of(id).unwrap_or(id);
            if !store.revoke_key(id, now).await.map_err(sentence)? {
                let why = "there is no such key that could be revoked; `ams keys list` shows all";
                return Err(AppError(format!("`{}`: {why}", plain(id, 40))));
            }
            screen.show(&json!({ "id": id, "revoked_at": now }), || format!("{id} is revoked\n"))?;
        }
        _ => {
            let keys = store.keys().await.map_err(sentence)?;
            let data: Vec<Value> = keys.iter().map(|key| shown(key, now)).collect();
            screen.show(&json!({ "data": data }), || list(screen, &keys, now))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn sentence(error: StoreError) -> AppError {
    AppError(error.to_string())
}

/// The store, which must be there already: a key in a new, empty one would open nothing.
async fn store(config: &StoreConfig) -> app::Result<Arc<dyn Store>> {
    if let StoreConfig::Sqlite(path) = config
        && !path.exists()
    {
        return Err(AppError(format!(
            "there is no store at {}; run this where `ams up` runs, make one with `ams migrate`, or set DATABASE_URL",
            path.display()
        )));
    }
    let store = app::open_store(config)?;
    let missing = store.missing_migrations().await.map_err(sentence)?;
    if missing.is_empty() {
        return Ok(store);
    }
    Err(AppError(format!("the store lacks the migrations {}; run `ams migrate`", missing.join(", "))))
}

/// The key that is asked for, and the whole of it.
fn wanted(matches: &ArgMatches, now: Timestamp) -> app::Result<(ApiKey, String)> {
    let name = text(matches, "name").unwrap_or_default().trim();
    if name.is_empty() || name.chars().count() > NAME_MAX {
        return Err(AppError(format!("the key's NAME must have from 1 to {NAME_MAX} characters")));
    }
    let expires_at = text(matches, "expires").map(|text| expiry(text, now)).transpose()?;
    let given: Vec<String> = matches.get_many("scope").unwrap_or_default().cloned().collect();
    // In our order, and each once.
    let scopes = keys::SCOPES.into_iter().filter(|scope| given.iter().any(|given| given == scope));
    let scopes: Vec<String> = scopes.map(str::to_owned).collect();
    keys::make(name, &scopes, now, expires_at).map_err(AppError)
}

fn expiry(text: &str, now: Timestamp) -> app::Result<Timestamp> {
    match config::duration(text) {
        Ok(Duration::ZERO) => {
            Err(AppError("--expires is 0, which is over at once; write for example 90d".into()))
        }
        Ok(wait) => Ok(now.after(wait)),
        Err(why) => Err(AppError(format!("--expires is `{text}`, which {why}; days are 90d"))),
    }
}

/// What a key is worth now, in a word.
fn state(key: &ApiKey, now: Timestamp) -> &'static str {
    if key.revoked_at.is_some() {
        "revoked"
    } else if key.expires_at.is_some_and(|at| at <= now) {
        "expired"
    } else {
        "valid"
    }
}

fn shown(key: &ApiKey, now: Timestamp) -> Value {
    json!({
        "id": key.id, "name": key.name, "scopes": key.scopes, "state": state(key, now),
        "created_at": key.created_at, "expires_at": key.expires_at,
        "last_used_at": key.last_used_at, "revoked_at": key.revoked_at,
    })
}

fn created(key: &ApiKey, whole: &str) -> String {
    let until =
        key.expires_at.map_or("until it is revoked".to_owned(), |at| format!("until {}", seconds(at)));
    format!(
        "{whole}\n\n\
         This is shown once: keep it now. It is good for {} {until}.\n\
         Programs send it with each request:  Authorization: Bearer {whole}\n\
         The verbs of `ams` take it from:     export AMS_KEY={whole}\n\
         It is taken back with:               ams keys revoke {}\n",
        key.scopes.join(", "),
        key.id,
    )
}

fn list(screen: Screen, keys: &[ApiKey], now: Timestamp) -> String {
    if keys.is_empty() {
        return "there is no key yet; `ams keys create NAME` makes one\n".to_owned();
    }
    let heads = ["ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "LAST USED", "STATE"];
    let time = |at: Option<Timestamp>| at.map_or("never".to_owned(), seconds);
    let row = |key: &ApiKey| {
        vec![
            key.id.clone(),
            plain(&key.name, 40),
            key.scopes.join(","),
            seconds(key.created_at),
            time(key.expires_at),
            time(key.last_used_at),
            state(key, now).to_owned(),
        ]
    };
    let rows: Vec<_> = keys.iter().map(row).collect();
    table(screen.paint, &heads, &rows, |column, cell| match (column, cell) {
        (6, "valid") => Some(Tone::Good),
        (6, _) => Some(Tone::Faint),
        _ => None,
    })
}

/// A time without the parts of its second.
fn seconds(time: Timestamp) -> String {
    Timestamp::from_micros(time.as_seconds() * 1_000_000).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(expires_at: Option<i64>, revoked_at: Option<i64>) -> ApiKey {
        let at = Timestamp::from_micros;
        let scopes = ["write".to_owned(), "read".to_owned()];
        let (key, _) = keys::make("shop", &scopes, at(0), expires_at.map(at)).unwrap();
        ApiKey { id: "ams_abcdefgh".to_owned(), revoked_at: revoked_at.map(at), ..key }
    }

    #[test]
    fn a_key_is_valid_until_it_expires_or_is_revoked() {
        let now = Timestamp::from_micros(1_000);
        for (key, expected) in [
            (key(None, None), "valid"),
            (key(Some(1_001), None), "valid"),
            (key(Some(1_000), None), "expired"),
            (key(None, Some(5)), "revoked"),
            (key(Some(5), Some(5)), "revoked"),
        ] {
            assert_eq!(state(&key, now), expected, "{key:?}");
        }
    }

    #[test]
    fn durations_become_times() {
        let day = 86_400_000_000;
        for (text, micros) in [("90d", 90 * day), ("1h", 3_600_000_000), ("30", 30_000_000), ("1w", 7 * day)]
        {
            assert_eq!(expiry(text, Timestamp::EPOCH).unwrap().as_micros(), micros, "{text}");
        }
        for text in ["0", "0s", "-1d", "soon", "2030-01-01", ""] {
            let error = expiry(text, Timestamp::EPOCH).unwrap_err().to_string();
            assert!(error.contains("--expires") && error.contains("90d"), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_asked_for_is_understood_or_refused() {
        let wanted = |arguments: &[&str]| {
            let line = ["keys", "create"].iter().chain(arguments);
            let matches = command().try_get_matches_from(line).map_err(|error| error.to_string())?;
            super::wanted(matches.subcommand().unwrap().1, Timestamp::EPOCH).map_err(|error| error.0)
        };
        for (arguments, scopes, expires) in [
            (&["shop"][..], "write,read", None),
            (&["shop", "--scope", "operate,read,read"], "read,operate", None),
            (&["shop", "--scope", "write", "--expires", "1s"], "write", Some(1_000_000)),
        ] {
            let (key, whole) = wanted(arguments).unwrap();
            assert_eq!((key.name.as_str(), key.scopes.join(",").as_str()), ("shop", scopes), "{arguments:?}");
            assert_eq!(key.expires_at.map(Timestamp::as_micros), expires);
            assert!(whole.starts_with(&key.id));
        }
        for (arguments, why) in [
            (&[][..], "NAME"),
            (&[" "], "NAME"),
            (&["shop", "--scope", "admin"], "operate"),
            (&["shop", "--expires", "soon"], "90d"),
        ] {
            let error = wanted(arguments).unwrap_err();
            assert!(error.contains(why), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn the_whole_key_is_in_the_first_answer_and_never_in_a_list() {
        let (key, whole) = keys::make("shop", &["write".to_owned()], Timestamp::EPOCH, None).unwrap();
        let text = created(&key, &whole);
        assert_eq!(text.lines().next(), Some(whole.as_str()));
        for words in ["shown once", "Authorization: Bearer", "AMS_KEY=", "until it is revoked", &key.id] {
            assert!(text.contains(words), "{words}: {text}");
        }
        let screen = Screen::new(false, false);
        let listed = list(screen, std::slice::from_ref(&key), Timestamp::EPOCH);
        assert!(listed.contains(&key.id) && listed.contains("1970-01-01T00:00:00Z"), "{listed}");
        let secret = &whole[key.id.len()..];
        assert!(!listed.contains(secret) && !shown(&key, Timestamp::EPOCH).to_string().contains(secret));
        assert!(list(screen, &[], Timestamp::EPOCH).contains("ams keys create"));
    }
}
