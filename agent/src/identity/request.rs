//! Asks the controller for one certificate: a new key, a request for it, the checked answer.
//!
//! Enters: an identity. Leaves: an [`Svid`], or why there is none. The key never leaves this process.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::channel::{ControllerEndpoint, in_words};
use super::clock::Clock;
use super::svid::{Svid, SvidFault};
use super::{SvidError, TrustBundle};
use crate::model::SpiffeId;
use crate::proto::ca::IstioCertificateRequest;
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;

/// How long one request may take, with the connect that it may need.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Whatever signs SVIDs.
pub trait Issuer: Send + Sync + 'static {
    /// Has `csr` (PEM, PKCS#10) signed for `id`. Gives the chain in PEM: the leaf first, the root last.
    fn issue(&self, id: SpiffeId, csr: String) -> BoxFuture<'static, Result<Vec<String>, IssueError>>;
}

/// Why an issuer gave no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// The issuer could not be asked, or did not answer: trying again may help by itself.
    #[error("the controller cannot be reached: {cause}")]
    Unreachable {
        /// The cause in words.
        cause: Arc<str>,
    },
    /// The issuer will not sign this.
    #[error("the controller refused: {message}")]
    Refused {
        /// The issuer's own words.
        message: Arc<str>,
    },
}

/// The controller's certificate service (`istio.v1.auth.IstioCertificateService`).
#[derive(Clone, Debug)]
pub struct ControllerIssuer {
    endpoint: ControllerEndpoint,
    channel: Channel,
    ttl: Duration,
}

impl ControllerIssuer {
    /// Asks the controller at `endpoint` for certificates that live `ttl`; it may give less. Needs a tokio runtime.
    #[must_use]
    pub fn new(endpoint: ControllerEndpoint, ttl: Duration) -> Self {
        let channel = endpoint.connect_lazily();
        Self { endpoint, channel, ttl }
    }

    async fn request(self, id: SpiffeId, csr: String) -> Result<Vec<String>, IssueError> {
        let identity = Value { kind: Some(Kind::StringValue(id.to_string())) };
        let message = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields: [("ImpersonatedIdentity".to_owned(), identity)].into() }),
        };
        let request = self.endpoint.authorize(message).await.map_err(|error| unreachable(error.to_string()))?;
        let mut client = IstioCertificateServiceClient::new(self.channel);
        match tokio::time::timeout(REQUEST_TIMEOUT, client.create_certificate(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner().cert_chain),
            Ok(Err(status)) => Err(issue_error(&status)),
            Err(_elapsed) => Err(unreachable(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))),
        }
    }
}

impl Issuer for ControllerIssuer {
    fn issue(&self, id: SpiffeId, csr: String) -> BoxFuture<'static, Result<Vec<String>, IssueError>> {
        Box::pin(self.clone().request(id, csr))
    }
}

/// Makes a key, has it certified for `id` and checks the answer, also against the roots of `trusted`.
///
/// # Errors
/// What the issuer says, or what is wrong with its answer.
pub(super) async fn obtain(
    issuer: &dyn Issuer,
    id: &SpiffeId,
    trusted: &TrustBundle,
    clock: &dyn Clock,
) -> Result<Svid, SvidError> {
    let (csr, key) = signing_request(id).map_err(|error| SvidError::Key(error.to_string().into()))?;
    let chain = issuer.issue(id.clone(), csr).await?;
    Svid::check(id, &chain, key, trusted, clock.now()).map_err(|fault: SvidFault| SvidError::Unusable(Arc::new(fault)))
}

fn signing_request(id: &SpiffeId) -> Result<(String, PrivateKeyDer<'static>), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
    let csr = params.serialize_request(&key)?.pem()?;
    Ok((csr, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
}

fn issue_error(status: &Status) -> IssueError {
    match status.code() {
        Code::PermissionDenied
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::NotFound
        | Code::OutOfRange
        | Code::AlreadyExists
        | Code::Unimplemented => IssueError::Refused { message: status.message().into() },
        Code::Unauthenticated => IssueError::Refused { message: format!("the token: {}", status.message()).into() },
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => unreachable(in_words(status)),
    }
}

fn unreachable(cause: String) -> IssueError {
    IssueError::Unreachable { cause: cause.into() }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::SystemTime;

    use tonic::service::Routes;
    use tonic::{Request, Response};

    use super::*;
    use crate::identity::SystemClock;
    use crate::identity::test_authority::{TestAuthority, now, seconds};
    use crate::identity::test_server::{TestServer, authenticate};
    use crate::proto::ca::IstioCertificateResponse;
    use crate::proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};

    const ID: &str = "spiffe://cluster.local/ns/shop/sa/cart";

    #[tokio::test]
    async fn the_controller_is_asked_for_the_identity_and_the_life_and_its_answer_is_an_svid() {
        let service = Arc::new(Service { authority: TestAuthority::new("mesh"), asked: Mutex::default() });
        let server = TestServer::start(Routes::new(IstioCertificateServiceServer::from_arc(Arc::clone(&service)))).await;
        let issuer = ControllerIssuer::new(server.endpoint(), Duration::from_secs(90));
        let svid = ask(&issuer, ID).await.expect("issued");
        assert_eq!(svid.id.to_string(), ID);
        assert_eq!(*service.asked.lock().expect("no panic"), Some((ID.to_owned(), 90)));
    }

    #[tokio::test]
    async fn a_refusal_keeps_the_controllers_words_and_a_silence_its_cause() {
        let service = Service { authority: TestAuthority::new("mesh"), asked: Mutex::default() };
        let mut server = TestServer::start(Routes::new(IstioCertificateServiceServer::new(service))).await;
        let issuer = ControllerIssuer::new(server.endpoint(), Duration::from_secs(90));
        let error = ask(&issuer, "spiffe://cluster.local/ns/shop/sa/elsewhere").await.expect_err("refused");
        assert_eq!(error.to_string(), "the controller refused: it runs on another node");
        std::fs::write(&server.token, "wrong").expect("written");
        let error = ask(&issuer, ID).await.expect_err("refused");
        assert_eq!(error.to_string(), "the controller refused: the token: no such token");
        std::fs::write(&server.token, "").expect("written");
        assert!(ask(&issuer, ID).await.expect_err("no token").to_string().contains("holds no token"));
        std::fs::write(&server.token, "secret").expect("written");
        ask(&issuer, ID).await.expect("the same issuer recovers");
        server.stop().await;
        let issuer = ControllerIssuer::new(server.endpoint(), Duration::from_secs(90));
        let error = ask(&issuer, ID).await.expect_err("gone").to_string();
        assert!(error.contains("cannot be reached: connection refused"), "{error}");
    }

    async fn ask(issuer: &ControllerIssuer, id: &str) -> Result<Svid, SvidError> {
        obtain(issuer, &id.parse().expect("a legal id"), &TrustBundle::empty(), &SystemClock).await
    }

    struct Service {
        authority: TestAuthority,
        asked: Mutex<Option<(String, i64)>>,
    }

    #[tonic::async_trait]
    impl IstioCertificateService for Service {
        async fn create_certificate(
            &self,
            request: Request<IstioCertificateRequest>,
        ) -> Result<Response<IstioCertificateResponse>, Status> {
            authenticate(&request)?;
            let message = request.into_inner();
            let identity = message.metadata.and_then(|mut metadata| metadata.fields.remove("ImpersonatedIdentity"));
            let Some(Kind::StringValue(identity)) = identity.and_then(|identity| identity.kind) else {
                return Err(Status::invalid_argument("no identity"));
            };
            if identity.ends_with("elsewhere") {
                return Err(Status::permission_denied("it runs on another node"));
            }
            *self.asked.lock().expect("no panic") = Some((identity, message.validity_duration));
            let begin: SystemTime = now() - seconds(1);
            let cert_chain = self.authority.sign(&message.csr, begin, begin + seconds(91));
            Ok(Response::new(IstioCertificateResponse { cert_chain }))
        }
    }
}
