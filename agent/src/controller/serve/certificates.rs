//! Certificates for the workloads of the node that asks.

use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use tonic::{Code, Request, Response, Status};
use tracing::{debug, error};

use super::Shared;
use super::authenticated::caller;
use crate::controller::authority::SignError;
use crate::controller::source::About;
use crate::model::SpiffeId;
use crate::observe::control_plane::Refusal;
use crate::proto::ca::istio_certificate_service_server::IstioCertificateService;
use crate::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};

/// The certificate service.
pub(super) struct Certificates(pub(super) Shared);

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let metrics = &self.0.metrics;
        match self.certificate(request).await {
            Ok(chain) => {
                metrics.issued();
                Ok(Response::new(IstioCertificateResponse { cert_chain: chain }))
            }
            Err(status) => {
                let reasons = [
                    (Code::Unauthenticated, Refusal::Unauthenticated),
                    (Code::PermissionDenied, Refusal::NotOnNode),
                    (Code::InvalidArgument, Refusal::BadRequest),
                ];
                let reason = reasons.iter().find(|(code, _)| *code == status.code());
                metrics.refused(reason.map_or(Refusal::Unable, |(_, reason)| *reason));
                Err(status)
            }
        }
    }
}

impl Certificates {
    /// The chain that is asked for: PEM texts, the leaf first.
    async fn certificate(&self, request: Request<IstioCertificateRequest>) -> Result<Vec<String>, Status> {
        let node = caller(&request)?;
        let request = request.into_inner();
        let identity = identity_of(&request)?;
        self.authorize(&node, &identity).await?;
        let asked = u64::try_from(request.validity_duration).ok().map(Duration::from_secs);
        let chain = self.0.authority.sign(&request.csr, &identity, asked, SystemTime::now()).map_err(refusal)?;
        debug!(%node, %identity, "signed a certificate");
        Ok(chain.pem)
    }

    /// Lets a node act for the enrolled pods that run on it, and for no others.
    async fn authorize(&self, node: &str, identity: &SpiffeId) -> Result<(), Status> {
        let resident = || self.0.states.borrow().residents().contains(node, identity);
        if resident() {
            return Ok(());
        }
        // The pod may have been written a moment ago.
        let about = About::Pods { namespace: identity.namespace().to_owned(), node: node.to_owned() };
        self.0.barrier.pass(about).await;
        if resident() {
            return Ok(());
        }
        debug!(node, %identity, "refused a certificate");
        Err(Status::permission_denied(format!("{identity} is not the identity of an enrolled pod on node {node}")))
    }
}

fn identity_of(request: &IstioCertificateRequest) -> Result<SpiffeId, Status> {
    let value = request.metadata.as_ref().and_then(|metadata| metadata.fields.get("ImpersonatedIdentity"));
    match value.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text.parse().map_err(|error| Status::invalid_argument(format!("{error}"))),
        _ => Err(Status::invalid_argument(
            "metadata.ImpersonatedIdentity is missing: it must be the SPIFFE ID that the certificate is for",
        )),
    }
}

fn refusal(failure: SignError) -> Status {
    match failure {
        SignError::TooLarge(_) | SignError::Form | SignError::ProofOfPossession | SignError::Key => {
            Status::invalid_argument(failure.to_string())
        }
        SignError::RootExpired(_) | SignError::Assemble(_) | SignError::Random => {
            error!("cannot sign: {failure}");
            Status::internal(failure.to_string())
        }
    }
}
