//! The one outbound call.

pub mod limits;

use std::sync::Arc;

use uuid::Uuid;

use crate::clock::Clock;
use crate::message::{Outcome, Ticket};
use crate::store::Endpoint;

/// Makes deliveries: one per process, shared by all of its lanes.
pub struct Delivery {
    clock: Clock,
    installation: Uuid,
}

impl Delivery {
    /// Tries `ticket` at `endpoint` once. Ends by the endpoint's deadline, whatever the receiver does.
    pub async fn deliver(&self, _ticket: &Ticket, _endpoint: &Endpoint) -> Outcome {
        let _ = (&self.clock, self.installation);
        unreachable!("replaced by the delivery slice")
    }
}

/// What a scripted delivery calls instead of the network.
pub type Script = Arc<dyn Fn(&Ticket, &Endpoint) -> Outcome + Send + Sync>;
