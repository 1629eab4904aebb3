//! Masks on the wire: the number of bits, then the bits, as PostgreSQL's `varbit`.

use std::error::Error;

use bytes::{BufMut, BytesMut};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use crate::store::{BATCH_MAX, Mask};

impl<'a> FromSql<'a> for Mask {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Mask, Box<dyn Error + Sync + Send>> {
        let bits = raw.get(4..).and_then(Mask::from_bytes);
        bits.ok_or_else(|| format!("a mask of {} bytes; it must have {BATCH_MAX} bits", raw.len()).into())
    }

    // What the server combines with `&` comes back as `bit`.
    accepts!(VARBIT, BIT);
}

impl ToSql for Mask {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_i32(i32::try_from(BATCH_MAX)?);
        out.put_slice(self.as_bytes());
        Ok(IsNull::No)
    }

    accepts!(VARBIT);
    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_reads_back() {
        let (mask, mut wire) = (Mask::first(11), BytesMut::new());
        mask.to_sql(&Type::VARBIT, &mut wire).unwrap();
        assert_eq!(Mask::from_sql(&Type::VARBIT, &wire).unwrap(), mask);
        assert!(Mask::from_sql(&Type::VARBIT, &wire[..9]).is_err());
        assert!(Mask::from_sql(&Type::VARBIT, b"").is_err());
    }
}
