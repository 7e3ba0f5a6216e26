//! SPIFFE IDs of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! The form is that of the SPIFFE ID standard, section 2, with the path that Kubernetes meshes share.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A trust domain's name: lower-case letters, digits, dots, hyphens and underscores, 1 to 255 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// The identity of a workload. Copies share its parts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<Parts>);

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Parts {
    trust_domain: TrustDomain,
    namespace: Box<str>,
    service_account: Box<str>,
}

/// Why a text is not a workload's SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// The text is not of the form `spiffe://TD/ns/NS/sa/SA`.
    #[error("`{0}` is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    /// The trust domain has a character outside `[a-z0-9._-]`, is empty or is too long.
    #[error("`{0}` is not a trust domain: use 1 to 255 of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
}

impl TrustDomain {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if text.is_empty() || text.len() > 255 || !text.bytes().all(legal) {
            return Err(SpiffeIdError::TrustDomain(text.to_owned()));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SpiffeId {
    /// The identity of `service_account` in `namespace`. Both must be Kubernetes names: neither empty nor holding a `/`.
    ///
    /// # Errors
    /// [`SpiffeIdError::Form`] when a part is empty or has a character outside `[A-Za-z0-9._-]`.
    pub fn new(trust_domain: TrustDomain, namespace: &str, service_account: &str) -> Result<Self, SpiffeIdError> {
        let legal = |text: &str| {
            !text.is_empty()
                && text != "."
                && text != ".."
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        };
        if !legal(namespace) || !legal(service_account) {
            return Err(SpiffeIdError::Form(format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")));
        }
        Ok(Self(Arc::new(Parts { trust_domain, namespace: namespace.into(), service_account: service_account.into() })))
    }

    /// The domain whose authority vouches for this identity.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// The Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// The Kubernetes service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.0.service_account
    }

    /// Whether a copy of it is held elsewhere.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// The identity as policies write it: without the `spiffe://`.
    #[must_use]
    pub fn principal(&self) -> String {
        let [_scheme, rest @ ..] = self.parts();
        rest.concat()
    }

    /// The pieces that its text is made of, in order.
    #[must_use]
    pub fn parts(&self) -> [&str; 6] {
        ["spiffe://", self.0.trust_domain.as_str(), "/ns/", &self.0.namespace, "/sa/", &self.0.service_account]
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || SpiffeIdError::Form(text.to_owned());
        let rest = text.strip_prefix("spiffe://").ok_or_else(form)?;
        let mut parts = rest.split('/');
        let mut next = || parts.next().ok_or_else(form);
        let (trust_domain, ns, namespace, sa, service_account) = (next()?, next()?, next()?, next()?, next()?);
        if ns != "ns" || sa != "sa" || parts.next().is_some() {
            return Err(form());
        }
        Self::new(trust_domain.parse()?, namespace, service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().into_iter().try_for_each(|part| f.write_str(part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spiffe_id_survives_display_and_parse() {
        let text = "spiffe://cluster.local/ns/shop/sa/cart";
        let id: SpiffeId = text.parse().expect("a legal id");
        assert_eq!(id.to_string(), text);
        assert_eq!((id.namespace(), id.service_account()), ("shop", "cart"));
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart");
    }

    #[test]
    fn texts_that_are_no_workload_identity_are_refused() {
        for text in [
            "",
            "cluster.local/ns/a/sa/b",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://Cluster.Local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/NS/a/sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a b/sa/c",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text} was taken");
        }
    }
}
