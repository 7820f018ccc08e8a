//! Certificates that tests make: with the mesh's own CA, or with one of their own.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::Value;

use crate::cluster::{Cluster, SYSTEM};
use crate::command;

/// Who signs.
#[derive(Debug)]
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Ca {
    /// The mesh's CA, out of its Secret.
    ///
    /// # Errors
    /// If the Secret cannot be read.
    pub fn of_the_mesh(cluster: &Cluster) -> Result<Self> {
        let secret = cluster.get(&["-n", SYSTEM, "secret", "ambit-ca"])?;
        let (certificate, key) = (decoded(&secret, "tls.crt")?, decoded(&secret, "tls.key")?);
        let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key)?)?;
        Ok(Self {
            issuer,
            certificate,
        })
    }

    /// A CA that nobody trusts.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn of_nobody() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "nobody");
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// A certificate of this identity and its key, as PEM.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn issue(&self, identity: &str) -> Result<String> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        Ok(leaf.pem() + &self.certificate + &key.serialize_pem())
    }
}

fn decoded(secret: &Value, key: &str) -> Result<String> {
    let data = secret["data"][key]
        .as_str()
        .with_context(|| format!("no {key} in the Secret"))?;
    command::run(std::process::Command::new("base64").arg("-d"), data)?.success()
}
