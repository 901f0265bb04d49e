use std::{future, net::SocketAddr, time::Duration};

use futures::future::BoxFuture;
use tokio::time::{self, Instant};

use super::{acceptor::Context, link::Link, refusal::Failure, timing::BackOff};

/// The attempts to reach a peer in one way, one at a time, with growing pauses.
pub(super) struct Lane {
    dial: Option<BoxFuture<'static, Attempt>>,
    back_off: BackOff,
    retry_at: Instant,
}

/// Where was dialled, and what came of it.
pub(super) type Attempt = (SocketAddr, Result<Link, Failure>);

impl Lane {
    pub(super) fn new(now: Instant) -> Self {
        Self { dial: None, back_off: BackOff::default(), retry_at: now }
    }

    /// When the next attempt may begin, if none is under way.
    pub(super) fn free_at(&self) -> Option<Instant> {
        self.dial.is_none().then_some(self.retry_at)
    }

    pub(super) fn begin(&mut self, address: SocketAddr, context: Context) {
        self.dial = Some(Box::pin(async move { (address, dial(address, &context).await) }));
    }

    /// The outcome of the attempt under way; cancel-safe. Pends while there is none.
    pub(super) async fn outcome(&mut self) -> Attempt {
        let Some(dial) = &mut self.dial else { return future::pending().await };
        let attempt = dial.await;
        self.dial = None;
        attempt
    }

    /// Puts the next attempt off, at most by `limit`.
    pub(super) fn put_off(&mut self, limit: Duration) {
        self.retry_at = Instant::now() + self.back_off.next(limit, rand::random());
    }

    /// Lets the next attempt begin at once.
    pub(super) fn clear(&mut self) {
        self.back_off.reset();
        self.retry_at = Instant::now();
    }

    pub(super) fn give_up(&mut self) {
        self.dial = None;
    }
}

async fn dial(address: SocketAddr, context: &Context) -> Result<Link, Failure> {
    let limit = context.timing.dial;
    let attempt = async {
        let link = context.connect(address).await?;
        link.accepted().await?;
        Ok(link)
    };
    time::timeout(limit, attempt).await.unwrap_or_else(|_| Err(Failure::timeout(limit)))
}
