//! Whether a program may work on a store: the migrations that it knows against those that are applied.
//!
//! During a rolling upgrade two versions share a store. A program goes on with migrations that it does
//! not know as long as it knows the one that the store needs (`installation.needs_migration`).

use std::collections::BTreeMap;

use super::{Result, StoreError};

/// A migration's name (without its number) and checksum, by its number.
pub(super) type Migrations = BTreeMap<i32, (String, String)>;

/// How a store stands to this program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SchemaVersion {
    /// Migrations that the program knows and the store lacks.
    pub missing: Vec<String>,
    /// Migrations that the store has and the program does not know; it may work on it all the same.
    pub newer: Vec<String>,
}

/// Compares what a program knows with what a store has. `needs` is the migration that a program has to
/// know to work on the store; `None` when the store does not say.
///
/// # Errors
/// [`StoreError::Unsupported`] when the program must not work on the store.
pub(super) fn compare(
    known: &Migrations,
    mut applied: Migrations,
    needs: Option<i32>,
) -> Result<SchemaVersion> {
    let mut version = SchemaVersion::default();
    for (number, (name, checksum)) in known {
        match applied.remove(number) {
            None => version.missing.push(written(*number, name)),
            Some((_, found)) if found == *checksum => {}
            Some((other, _)) => {
                return Err(StoreError::Unsupported(format!(
                    "the store's migration {} is not this program's {}: they are of different versions; \
                     use the program that migrated the store",
                    written(*number, &other),
                    written(*number, name)
                )));
            }
        }
    }
    version.newer = applied.iter().map(|(number, (name, _))| written(*number, name)).collect();
    let newest = known.keys().next_back().copied().unwrap_or(0);
    let follows = version.missing.is_empty() && applied.keys().all(|number| *number > newest);
    if version.newer.is_empty() || (follows && needs.is_some_and(|needs| needs <= newest)) {
        return Ok(version);
    }
    let needed = match needs.filter(|needs| *needs > newest) {
        Some(needs) => format!("it needs a program that knows V{needs}"),
        None => "they are of different versions".to_owned(),
    };
    Err(StoreError::Unsupported(format!(
        "the store has the migration {}, which this program does not know, and {needed}; use a newer program",
        version.newer.join(", ")
    )))
}

fn written(number: i32, name: &str) -> String {
    format!("V{number}__{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migrations(numbers: impl IntoIterator<Item = i32>) -> Migrations {
        numbers.into_iter().map(|number| (number, (format!("m{number}"), format!("sum{number}")))).collect()
    }

    fn refused(applied: Migrations, needs: Option<i32>) -> String {
        match compare(&migrations(1..=5), applied, needs) {
            Err(StoreError::Unsupported(sentence)) => sentence,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_program_says_what_its_store_lacks() {
        let version = compare(&migrations(1..=3), migrations(1..=1), None).unwrap();
        assert_eq!((version.missing, version.newer), (vec!["V2__m2".into(), "V3__m3".into()], vec![]));
        assert_eq!(
            compare(&migrations(1..=3), migrations(1..=3), Some(3)).unwrap(),
            SchemaVersion::default()
        );
    }

    #[test]
    fn a_newer_store_is_accepted_as_long_as_the_program_knows_what_it_needs() {
        for needs in [1, 4, 5] {
            let version = compare(&migrations(1..=5), migrations(1..=7), Some(needs)).unwrap();
            assert_eq!(version.newer, ["V6__m6", "V7__m7"], "needs {needs}");
        }
        let sentence = refused(migrations(1..=7), Some(6));
        assert_eq!(
            sentence,
            "the store has the migration V6__m6, V7__m7, which this program does not know, and it needs a \
             program that knows V6; use a newer program"
        );
    }

    #[test]
    fn stores_of_another_line_are_refused() {
        // A store that does not say what it needs, one that lacks what comes before, and a changed migration.
        assert!(refused(migrations(1..=6), None).contains("different versions"));
        assert!(refused(migrations([1, 2, 3, 4, 6]), Some(4)).contains("V6__m6"));
        let mut changed = migrations(1..=5);
        changed.insert(2, ("m2".into(), "another".into()));
        assert!(refused(changed, Some(5)).contains("V2__m2"));
    }
}
