use std::{
    future::poll_fn, net::SocketAddr, num::NonZeroU16, path::PathBuf, pin::Pin, task::Poll,
    time::Duration,
};

use tokio::time;
use weft_model::Probe;

use super::{
    exec::{self, Programs},
    failure::Failure,
    http,
    outlet::{Outlet, Places},
    targets::{Engine, Target},
};

/// Finds out once whether a backend can serve.
pub(super) trait Prober: Send + Sync + 'static {
    fn probe(&self, target: &Target) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Asks the endpoint itself: over its own interface, as clients reach it.
pub(super) struct EndpointProber<O> {
    outlet: O,
    programs: Programs,
    places: Places,
}

impl<O: Outlet> EndpointProber<O> {
    pub(super) fn new(outlet: O, programs: PathBuf) -> Self {
        Self { outlet, programs: Programs::new(programs), places: Places::default() }
    }

    async fn attempt(&self, target: &Target) -> Result<(), Failure> {
        match &target.check.probe {
            Probe::Tcp { port } => self.connect(target, *port).await.map(drop),
            Probe::Http { port, path, status, body } => {
                let (stream, address) = self.connect(target, *port).await?;
                let wanted = http::Wanted { path, status: *status, body: body.as_deref() };
                http::get(stream, address, wanted).await
            }
            Probe::Exec { command } => {
                let command = self.programs.command(command, &target.program)?;
                let start = self.outlet.start(command, &target.program);
                self.places.for_program(start).await?.end().await
            }
            Probe::Engine => match &target.engine {
                Some(Engine::Podman(container)) => {
                    exec::start(exec::podman_check(container), None).await?.end().await
                }
                // Docker tells by itself.
                Some(Engine::Docker) | None => Err(Failure::NoEngine),
            },
        }
    }

    /// Connects to the first of the endpoint's addresses that accepts; all are tried at once, because
    /// one that swallows what it is sent would take the whole time.
    async fn connect(
        &self,
        target: &Target,
        port: NonZeroU16,
    ) -> Result<(O::Stream, SocketAddr), Failure> {
        let attempt = |(address, from)| async move {
            let socket = self.outlet.socket(target.network, address, from);
            let socket = self.places.for_socket(socket).await?;
            O::connect(socket, address).await.map(|stream| (stream, address))
        };
        let attempts = target.at(port).map(|at| Box::pin(attempt(at))).collect();
        first_success(attempts).await
    }
}

/// What the first of `attempts` that succeeds comes to; if all fail, why the first failed.
async fn first_success<T, F>(mut attempts: Vec<Pin<Box<F>>>) -> Result<T, Failure>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut failures: Vec<Option<Failure>> = attempts.iter().map(|_| None).collect();
    poll_fn(|context| {
        for (attempt, failure) in attempts.iter_mut().zip(&mut failures) {
            if failure.is_some() {
                continue;
            }
            match attempt.as_mut().poll(context) {
                Poll::Ready(Ok(success)) => return Poll::Ready(Ok(success)),
                Poll::Ready(Err(error)) => *failure = Some(error),
                Poll::Pending => {}
            }
        }
        match failures.iter().all(Option::is_some) {
            true => Poll::Ready(Err(failures[0].take().expect("an endpoint has an address"))),
            false => Poll::Pending,
        }
    })
    .await
}

impl<O: Outlet> Prober for EndpointProber<O> {
    async fn probe(&self, target: &Target) -> Result<(), Failure> {
        let milliseconds = target.check.timeout;
        let limit = Duration::from_millis(milliseconds.into());
        let late = |_| Err(Failure::Late { milliseconds });
        time::timeout(limit, self.attempt(target)).await.unwrap_or_else(late)
    }
}
