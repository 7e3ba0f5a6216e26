//! Authentication of requests by their heads, before anything of their bodies is kept.
//!
//! Enters: a request. Leaves: the same with the node that it comes from, or a refusal.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::{Request, Status};

use super::{ConnectionAuth, Shared};
use crate::observe::ControllerMetrics;

/// A service that only hears requests of nodes.
#[derive(Clone)]
pub(super) struct Authenticated<S> {
    inner: S,
    shared: Shared,
    /// Counts a request that was refused.
    refused: fn(&ControllerMetrics),
}

/// The node that a request comes from.
#[derive(Clone, Debug)]
struct Caller(Arc<str>);

/// The node that a request comes from, as [`Authenticated`] has found out.
///
/// # Errors
/// UNAUTHENTICATED for a request that did not come through there.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Arc<str>, Status> {
    let caller = request.extensions().get::<Caller>();
    caller.map(|caller| Arc::clone(&caller.0)).ok_or_else(|| Status::unauthenticated("the request was not authenticated"))
}

impl<S> Authenticated<S> {
    pub(super) fn new(inner: S, shared: &Shared, refused: fn(&ControllerMetrics)) -> Self {
        Self { inner, shared: shared.clone(), refused }
    }
}

impl<S> Service<http::Request<Body>> for Authenticated<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let (mut inner, shared, refused) = (self.inner.clone(), self.shared.clone(), self.refused);
        Box::pin(async move {
            let metadata = MetadataMap::from_headers(request.headers().clone());
            let connection = request.extensions().get::<ConnectionAuth>().cloned();
            match shared.node_of(&metadata, connection).await {
                Ok(node) => {
                    request.extensions_mut().insert(Caller(node));
                    inner.call(request).await
                }
                Err(status) => {
                    refused(&shared.metrics);
                    Ok(status.into_http())
                }
            }
        })
    }
}

impl<S: NamedService> NamedService for Authenticated<S> {
    const NAME: &'static str = S::NAME;
}
