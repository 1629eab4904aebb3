//! Times on the wire: microseconds since the start of the year 2000, as PostgreSQL keeps them.
//!
//! A type of a library would panic on a time that it can't hold. This one holds what RFC 3339 can write, and takes
//! what lies beyond (`infinity`, the year 20000) for the nearest that it holds.

use std::error::Error;

use bytes::{BufMut, BytesMut};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use crate::clock::Timestamp;

/// 2000-01-01T00:00:00Z in microseconds since the Unix epoch.
const YEAR_2000: i64 = 946_684_800_000_000;

impl<'a> FromSql<'a> for Timestamp {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Timestamp, Box<dyn Error + Sync + Send>> {
        let since_2000 = i64::from_be_bytes(raw.try_into()?);
        Ok(Timestamp::from_micros(since_2000.saturating_add(YEAR_2000)))
    }

    accepts!(TIMESTAMPTZ);
}

impl ToSql for Timestamp {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_i64(self.as_micros() - YEAR_2000);
        Ok(IsNull::No)
    }

    accepts!(TIMESTAMPTZ);
    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(since_2000: i64) -> Timestamp {
        Timestamp::from_sql(&Type::TIMESTAMPTZ, &since_2000.to_be_bytes()).unwrap()
    }

    #[test]
    fn times_beyond_the_program_are_the_nearest_that_it_holds() {
        assert_eq!((read(i64::MIN), read(i64::MAX)), (Timestamp::MIN, Timestamp::MAX));
        assert_eq!(read(0).to_string(), "2000-01-01T00:00:00Z");
        assert!(Timestamp::from_sql(&Type::TIMESTAMPTZ, b"short").is_err());
    }

    proptest! {
        #[test]
        fn times_read_back(micros in Timestamp::MIN.as_micros()..=Timestamp::MAX.as_micros()) {
            let (time, mut wire) = (Timestamp::from_micros(micros), BytesMut::new());
            time.to_sql(&Type::TIMESTAMPTZ, &mut wire).unwrap();
            prop_assert_eq!(Timestamp::from_sql(&Type::TIMESTAMPTZ, &wire).unwrap(), time);
        }
    }
}
