//! SIGTERM and SIGINT: the first asks for a clean stop, the second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{AppError, Result};

/// A token that the first signal cancels.
///
/// # Errors
/// When the system does not let us listen to signals.
pub fn stop_on_signals() -> Result<CancellationToken> {
    let refused = |error| AppError(format!("the system does not let us listen to signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(refused)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(refused)?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        for patience in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if !patience {
                // The exit code that a shell gives to an interrupted command.
                std::process::exit(130);
            }
            tracing::info!("stopping: finishing what is in flight; a second signal ends at once");
            token.cancel();
        }
    });
    Ok(stop)
}
