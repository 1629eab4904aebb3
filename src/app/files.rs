//! The limit of open files, and how a process shares it out.

/// Open files wanted: the default endpoint setting allows a thousand connections to each endpoint.
pub const FILES: u64 = 65_536;

/// Files kept for store, queue, cache, log and runtime: `ams up` at rest has 62 open on the full stack with one
/// broker, 19 on embedded parts (measured); each further broker has some more. Half of the limit, when that is less.
const RESERVE: u64 = 256;

/// No limit that a system tells is believed beyond this.
const LIMIT_MAX: u64 = 1 << 20;

/// What every system allows; taken when it does not tell.
const LIMIT_USUAL: u64 = 1_024;

/// Connections that may be open at once. Neither can take the files of the other, nor those of the reserve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    /// From clients of the API.
    pub(super) api: usize,
    /// To receivers.
    pub(super) deliveries: usize,
}

impl Shares {
    /// The shares of a process that may have `limit` files open: beyond the reserve a quarter is for the API, and as
    /// much as it can use at most; the rest is for deliveries.
    pub(super) fn of(limit: u64) -> Shares {
        let limit = limit.min(LIMIT_MAX);
        let rest = limit - RESERVE.min(limit / 2);
        let count = |files: u64| usize::try_from(files).unwrap_or(usize::MAX).max(1);
        let api = count(rest / 4).min(crate::api::CONNECTIONS);
        Shares { api, deliveries: count(rest).saturating_sub(api).max(1) }
    }

    /// The shares under the limit that holds now.
    pub(super) fn now() -> Shares {
        Shares::of(rlimit::getrlimit(rlimit::Resource::NOFILE).map_or(LIMIT_USUAL, |(limit, _)| limit))
    }
}

/// Raises the limit as far as is wanted and allowed.
pub(super) fn raise_limit() {
    match rlimit::increase_nofile_limit(FILES) {
        Ok(limit) if limit < FILES => {
            let Shares { api, deliveries } = Shares::of(limit);
            tracing::warn!(
                "at most {limit} files can be open, hence {deliveries} connections to receivers and {api} from \
                 clients; for many slow endpoints allow {FILES} (ulimit -n)"
            );
        }
        Ok(limit) => tracing::debug!("up to {limit} files may be open"),
        Err(error) => tracing::warn!("the limit of open files stays as it is: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_share_of_the_limit_and_some_is_left() {
        for (limit, api, deliveries) in [
            (65_536, 4_096, 61_184),
            (16_384, 4_032, 12_096),
            (1_024, 192, 576),
            (256, 32, 96),
            (128, 16, 48),
            (64, 8, 24),
            (8, 1, 3),
        ] {
            assert_eq!(Shares::of(limit), Shares { api, deliveries }, "of {limit}");
            let left = limit - (api + deliveries) as u64;
            assert!(left >= RESERVE.min(limit / 2), "{left} of {limit}");
        }
    }

    #[test]
    fn a_limit_that_makes_no_sense_is_shared_out_all_the_same() {
        for limit in [0, 1, 2] {
            assert_eq!(Shares::of(limit), Shares { api: 1, deliveries: 1 }, "of {limit}");
        }
        assert!(Shares::of(u64::MAX).deliveries < 1 << 20);
    }
}
