use std::time::SystemTime;

use base64::Engine as _;
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use time::{Duration, OffsetDateTime};

use super::material::{IntermediateTexts, Material};
use super::pem_of;

/// The texts of an authority as a user's `cacerts` has them.
#[derive(Clone)]
pub(in crate::controller) struct Texts {
    pub(in crate::controller) certificate: String,
    pub(in crate::controller) key: String,
    pub(in crate::controller) chain: String,
    pub(in crate::controller) roots: String,
}

/// An authority of the user's own.
pub(in crate::controller) struct UsersRoot {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

fn params(name: &str, from: Duration, to: Duration) -> CertificateParams {
    let now = OffsetDateTime::from(SystemTime::now());
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = (now + from, now + to);
    params
}

impl UsersRoot {
    pub(in crate::controller) fn new(name: &str) -> Self {
        let (key, params) = (KeyPair::generate().unwrap(), params(name, Duration::days(-1), Duration::days(1000)));
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    pub(in crate::controller) fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// An authority below it.
    pub(in crate::controller) fn intermediate(&self, name: &str) -> Texts {
        self.intermediate_of(params(name, Duration::days(-1), Duration::days(100)), &KeyPair::generate().unwrap())
    }

    fn intermediate_of(&self, params: CertificateParams, key: &KeyPair) -> Texts {
        let certificate = params.signed_by(key, &self.issuer).unwrap();
        Texts {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            chain: certificate.pem() + &self.pem(),
            roots: self.pem(),
        }
    }
}

impl Texts {
    fn read(&self) -> Result<Material, String> {
        let Self { certificate, key, chain, roots } = self;
        let texts = IntermediateTexts { certificate, key, chain, roots };
        Material::intermediate(&texts, SystemTime::now().into()).map_err(|error| error.to_string())
    }
}

#[test]
fn an_intermediate_signs_with_its_chain_whether_or_not_that_names_the_root() {
    let root = UsersRoot::new("root");
    let texts = root.intermediate("one");
    let short = Texts { chain: texts.certificate.clone(), ..texts.clone() };
    for texts in [&texts, &short] {
        let material = texts.read().unwrap();
        assert_eq!((material.intermediates.len(), pem_of(&material.root)), (1, pem_of(root.certificate.der())));
        assert_eq!(pem_of(material.issuer()).lines().nth(1), texts.certificate.lines().nth(1));
    }
}

#[test]
fn a_chain_of_several_ends_at_the_right_one_of_several_roots() {
    let (root, other) = (UsersRoot::new("root"), UsersRoot::new("other"));
    let key = KeyPair::generate().unwrap();
    let upper_params = params("upper", Duration::days(-1), Duration::days(50));
    let upper = root.intermediate_of(upper_params.clone(), &key);
    let upper_issuer = Issuer::new(upper_params, key);
    let key = KeyPair::generate().unwrap();
    let lower = params("lower", Duration::days(-1), Duration::days(100)).signed_by(&key, &upper_issuer).unwrap().pem();
    let texts = Texts {
        chain: lower.clone() + &upper.certificate,
        certificate: lower,
        key: key.serialize_pem(),
        roots: other.pem() + &root.pem(),
    };
    let material = texts.read().unwrap();
    assert_eq!((material.intermediates.len(), material.roots.len()), (2, 2));
    assert_eq!(&material.root, root.certificate.der());
    assert!(material.expires < OffsetDateTime::now_utc() + Duration::days(51), "the shortest life counts");
}

#[test]
fn a_root_of_the_user_s_that_signs_itself_is_taken() {
    let key = KeyPair::generate().unwrap();
    let pem = params("own", Duration::days(-1), Duration::days(9)).self_signed(&key).unwrap().pem();
    let texts = Texts { certificate: pem.clone(), key: key.serialize_pem(), chain: pem.clone(), roots: pem };
    let material = texts.read().unwrap();
    assert!(material.intermediates.is_empty() && material.issuer() == material.anchor());
}

/// Keys as `openssl genrsa -traditional` and `openssl ecparam -genkey` write them: what PKCS #8 wraps.
#[test]
fn keys_of_older_forms_are_taken() {
    let root = UsersRoot::new("root");
    let check = |key: KeyPair, wrapper: usize, label: &str, before: &str| {
        let mut texts = root.intermediate_of(params("old", Duration::days(-1), Duration::days(9)), &key);
        let inner = base64::engine::general_purpose::STANDARD.encode(&key.serialize_der()[wrapper..]);
        texts.key = format!("{before}-----BEGIN {label}-----\n{inner}\n-----END {label}-----\n");
        texts.read().unwrap_or_else(|error| panic!("{label}: {error}"));
    };
    let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    check(rsa, 26, "RSA PRIVATE KEY", "");
    let parameters = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n";
    check(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(), 29, "EC PRIVATE KEY", parameters);
}

#[test]
fn what_cannot_sign_is_refused_by_the_name_of_its_text() {
    let (root, other) = (UsersRoot::new("root"), UsersRoot::new("other"));
    let good = root.intermediate("one");
    let dated = |from: i64, to: i64| {
        root.intermediate_of(params("dated", Duration::days(from), Duration::days(to)), &KeyPair::generate().unwrap())
    };
    let mut no_authority = params("leaf", Duration::days(-1), Duration::days(9));
    no_authority.is_ca = IsCa::ExplicitNoCa;
    let mut constrained = params("constrained", Duration::days(-1), Duration::days(9));
    constrained.key_usages = vec![KeyUsagePurpose::CrlSign];
    let key = || KeyPair::generate().unwrap();
    let check = |texts: &Texts, begin: &str, end: &str| {
        let error = texts.read().unwrap_err();
        assert!(error.starts_with(begin) && error.contains(end), "{error}, not {begin} ... {end}");
    };
    check(&Texts { key: other.intermediate("two").key, ..good.clone() }, "ca-cert.pem", "not the certificate of the key");
    check(&Texts { key: "none".to_owned(), ..good.clone() }, "ca-key.pem", "no usable private key");
    check(&Texts { certificate: String::new(), ..good.clone() }, "ca-cert.pem", "no PEM certificate");
    check(&Texts { roots: other.pem(), ..good.clone() }, "cert-chain.pem", "does not lead from ca-cert.pem to a root");
    check(&Texts { roots: "x".to_owned(), ..good.clone() }, "root-cert.pem", "no PEM certificate");
    check(&dated(-9, -1), "ca-cert.pem", "expired at");
    check(&dated(1, 9), "ca-cert.pem", "not valid before");
    check(&root.intermediate_of(no_authority, &key()), "ca-cert.pem", "basicConstraints");
    check(&root.intermediate_of(constrained, &key()), "ca-cert.pem", "keyCertSign");
}
