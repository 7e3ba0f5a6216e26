//! The certificates of an API server and of its administrator, and the keys of its service accounts. They last for a day.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::ADDRESS;

pub(super) const ROOT: &str = "ca.crt";
pub(super) const SERVER_CERTIFICATE: &str = "server.crt";
pub(super) const SERVER_KEY: &str = "server.key";
pub(super) const ACCOUNTS_KEY: &str = "accounts.key";
pub(super) const ACCOUNTS_PUBLIC: &str = "accounts.pub";
pub(super) const KUBECONFIG: &str = "kubeconfig";
const ADMIN_CERTIFICATE: &str = "admin.crt";
const ADMIN_KEY: &str = "admin.key";

/// Writes all of it into a directory.
pub(super) fn make(directory: &Path) -> Result<()> {
    let write = |name: &str, text: &str| {
        let file = directory.join(name);
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
    };
    let mut root = params("culvert-bench", None)?;
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = CertifiedIssuer::self_signed(root, KeyPair::generate()?)?;
    write(ROOT, &root.pem())?;

    let mut server = CertificateParams::new(vec![ADDRESS.to_owned(), "kubernetes".to_owned()])?;
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    write(SERVER_CERTIFICATE, &server.signed_by(&key, &root)?.pem())?;
    write(SERVER_KEY, &key.serialize_pem())?;

    let mut admin = params("admin", Some("system:masters"))?;
    admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    write(ADMIN_CERTIFICATE, &admin.signed_by(&key, &root)?.pem())?;
    write(ADMIN_KEY, &key.serialize_pem())?;

    let accounts = KeyPair::generate()?;
    write(ACCOUNTS_KEY, &accounts.serialize_pem())?;
    write(ACCOUNTS_PUBLIC, &accounts.public_key_pem())?;
    let cluster = json!({"server": format!("https://{ADDRESS}:6443"), "certificate-authority": directory.join(ROOT)});
    let user = json!({"client-certificate": directory.join(ADMIN_CERTIFICATE), "client-key": directory.join(ADMIN_KEY)});
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bench",
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "admin"}}],
        "clusters": [{"name": "bench", "cluster": cluster}],
        "users": [{"name": "admin", "user": user}],
    });
    write(KUBECONFIG, &kubeconfig.to_string())
}

fn params(name: &str, organisation: Option<&str>) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(organisation) = organisation {
        params.distinguished_name.push(DnType::OrganizationName, organisation);
    }
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::HOUR, now + Duration::DAY);
    Ok(params)
}
