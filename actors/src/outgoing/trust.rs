//! Whom the container trusts: the TLS settings of its connections.
//!
//! The certificates of its image if it has some, for that is where its authors put a private authority; else Mozilla's,
//! which are built in, for most images of wasm have no file but the program. Made when the first https request wants them,
//! once for each container, never from a default of the process.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::OnceCell;

use super::failure::Failure;
use crate::files;

/// Where distributions keep their bundle: Debian, Alpine and their kin; Fedora and its kin.
const BUNDLES: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// A bundle larger than this is refused; Mozilla's has some 230 KB.
const MAX_BUNDLE: u64 = 4 << 20;

/// The container's trust, not read yet.
#[derive(Debug)]
pub(super) struct Trust {
    rootfs: Option<PathBuf>,
    /// `SSL_CERT_FILE` of its environment.
    named: Option<PathBuf>,
    config: OnceCell<Arc<ClientConfig>>,
}

impl Trust {
    pub(super) fn new(rootfs: Option<PathBuf>, named: Option<PathBuf>) -> Self {
        let named = named.filter(|path| !path.as_os_str().is_empty());
        Self { rootfs, named, config: OnceCell::new() }
    }

    /// The settings of a TLS connection; reads and builds them the first time.
    ///
    /// # Errors
    /// `Configuration` with the file and the cause.
    pub(super) async fn config(&self) -> Result<Arc<ClientConfig>, Failure> {
        let made = self.config.get_or_try_init(|| async {
            let (rootfs, named) = (self.rootfs.clone(), self.named.clone());
            tokio::task::spawn_blocking(move || build(rootfs.as_deref(), named.as_deref()))
                .await
                .map_err(|e| Failure::Internal(format!("reading certificates: {e}")))?
        });
        made.await.cloned()
    }
}

fn build(rootfs: Option<&Path>, named: Option<&Path>) -> Result<Arc<ClientConfig>, Failure> {
    let roots = match of_image(rootfs, named)? {
        Some(roots) => roots,
        None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Failure::Internal(format!("TLS: {e}")))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The certificates of the image: the file that its environment names, which must be there, or one of the usual ones.
fn of_image(rootfs: Option<&Path>, named: Option<&Path>) -> Result<Option<RootCertStore>, Failure> {
    let Some(rootfs) = rootfs else { return Ok(None) };
    if let Some(path) = named {
        let missing = "no such file in the image; add it or unset SSL_CERT_FILE";
        let found = bundle(rootfs, path)?.ok_or_else(|| refuse(path, missing));
        return found.map(Some);
    }
    let usual = BUNDLES.iter().find_map(|path| bundle(rootfs, Path::new(path)).transpose());
    usual.transpose()
}

fn bundle(rootfs: &Path, path: &Path) -> Result<Option<RootCertStore>, Failure> {
    let pem = match files::read_in(rootfs, path, MAX_BUNDLE) {
        Ok((pem, true)) => pem,
        Ok((_, false)) => return Err(refuse(path, &format!("more than the {MAX_BUNDLE} bytes accepted"))),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(refuse(path, &error.to_string())),
    };
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok);
    // Bundles hold old certificates that nobody can read any more: those are left out, as everywhere.
    let (added, ignored) = roots.add_parsable_certificates(certificates);
    tracing::debug!(path = %path.display(), added, ignored, "read the image's certificates");
    if added == 0 { Err(refuse(path, "no certificate in PEM form in it")) } else { Ok(Some(roots)) }
}

fn refuse(path: &Path, why: &str) -> Failure {
    Failure::Configuration(format!("certificates of the image: {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(path: &str, text: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
        root
    }

    fn certificate() -> String {
        rcgen::generate_simple_self_signed(["a.test".into()]).unwrap().cert.pem()
    }

    #[test]
    fn an_image_without_certificates_leaves_the_built_in_ones() {
        let root = tempfile::tempdir().unwrap();
        assert!(of_image(None, None).unwrap().is_none());
        assert!(of_image(Some(root.path()), None).unwrap().is_none());
        assert!(build(Some(root.path()), None).is_ok());
    }

    #[test]
    fn the_images_bundle_is_found_where_distributions_put_it() {
        for path in BUNDLES {
            let text = format!("# a comment\n{}\n{}", certificate(), certificate());
            let roots = of_image(Some(image(path, &text).path()), None).unwrap().unwrap();
            assert_eq!(roots.len(), 2, "{path}");
        }
    }

    #[test]
    fn a_named_bundle_comes_first_and_must_be_usable() {
        let named = Path::new("/certs/own.pem");
        let root = image("/certs/own.pem", &certificate());
        assert_eq!(of_image(Some(root.path()), Some(named)).unwrap().unwrap().len(), 1);
        for (root, words) in [
            (image(BUNDLES[0], &certificate()), "no such file in the image; add it or unset SSL_CERT_FILE"),
            (image("/certs/own.pem", "nothing"), "no certificate in PEM form"),
            (image("/certs/own.pem/a", ""), "not a regular file"),
        ] {
            let error = build(Some(root.path()), Some(named)).unwrap_err().to_string();
            assert!(error.contains("/certs/own.pem: ") && error.contains(words), "{error}");
        }
    }
}
