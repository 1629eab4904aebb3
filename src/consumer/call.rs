//! Calls that run beside a task, which asks now and then whether they have come back.

use std::pin::Pin;

/// A call under way.
pub(super) type Call<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Waits for a call that may not be there.
pub(super) async fn under_way<T>(call: &mut Option<Call<T>>) -> T {
    match call {
        Some(call) => call.await,
        None => std::future::pending().await,
    }
}
