//! What is asked of containerd: a container's image, an image's target, a blob's bytes.
//!
//! Invariant: every answer is awaited for [`ANSWER`] at most, and no blob is handed on whose size or digest is not what its
//! descriptor says.

use std::cmp::Ordering;
use std::error::Error as StdError;
use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    GetContainerRequest, GetImageRequest, InfoRequest, ReadContentRequest, ReadContentResponse,
};
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_client::tonic::transport::{Channel, Endpoint};
use containerd_client::tonic::{Code, Request, Response, Status, Streaming};
use sha2::{Digest as _, Sha256};
use troupe_actors::Error;

use super::document::Descriptor;
use super::late;
use super::walk::{Blobs, Fault};

/// containerd answers in milliseconds; one that is busy unpacking may take seconds.
const ANSWER: Duration = Duration::from_secs(10);

const READING: &str = "read the image's content from containerd";

/// A container's record holds its whole spec, which may have ten thousand arguments.
const MAX_RECORD: usize = 16 << 20;

/// How much containerd may send ahead. With HTTP/2's own 64 KiB a module of 13 MB takes 30 ms instead of 23.
const WINDOW: u32 = 4 << 20;
/// How much of it in one piece; containerd reads its files in pieces of a MiB.
const FRAME: u32 = 1 << 20;

/// One connection to containerd, for one namespace.
pub struct Store {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
}

impl Store {
    /// Connects to the gRPC socket at `path`.
    ///
    /// # Errors
    /// `Host` when nobody listens there.
    pub async fn connect(path: &Path, namespace: &str) -> Result<Self, Error> {
        let what = format!("connect to containerd at {}", path.display());
        let namespace =
            namespace.parse().map_err(|_| Error::invalid(format!("namespace {namespace:?}: not a name")))?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", path.display()));
        let endpoint = endpoint.map_err(|e| Error::host(&what, io::Error::other(root_cause(&e))))?;
        let endpoint = endpoint.initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW);
        match tokio::time::timeout(ANSWER, endpoint.max_frame_size(FRAME).connect()).await {
            Ok(Ok(channel)) => Ok(Self { channel, namespace }),
            Ok(Err(error)) => Err(Error::host(what, io::Error::other(root_cause(&error)))),
            Err(_) => Err(late(&what, ANSWER)),
        }
    }

    /// The name of a container's image; `None` for a container without one, or one that containerd does not know.
    ///
    /// # Errors
    /// `Host`, as all that follow.
    pub async fn image_of(&self, container: &str) -> Result<Option<String>, Error> {
        let mut client = ContainersClient::new(self.channel.clone()).max_decoding_message_size(MAX_RECORD);
        let request = self.request(GetContainerRequest { id: container.to_owned() });
        let answer = answer("ask containerd for the container", client.get(request)).await?;
        let image = answer.and_then(|answer| answer.container).map(|container| container.image);
        Ok(image.filter(|image| !image.is_empty()))
    }

    /// What an image's name stands for; `None` when there is no image of that name.
    ///
    /// # Errors
    /// As above.
    pub async fn target(&self, image: &str) -> Result<Option<Descriptor>, Error> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(GetImageRequest { name: image.to_owned() });
        let answer = answer("ask containerd for the image", client.get(request)).await?;
        let target = answer.and_then(|answer| answer.image?.target);
        Ok(target.map(|target| Descriptor {
            media_type: target.media_type,
            digest: target.digest,
            // Negative would be containerd's mistake: such a blob cannot be read.
            size: target.size.try_into().unwrap_or(u64::MAX),
            ..Default::default()
        }))
    }

    /// Begins to read a blob.
    ///
    /// # Errors
    /// `Missing`, or `Host` as above.
    pub async fn open(&self, blob: &Descriptor) -> Result<Incoming, Fault> {
        let mut client = ContentClient::new(self.channel.clone());
        let request = self.request(ReadContentRequest { digest: blob.digest.clone(), offset: 0, size: 0 });
        let stream = answer(READING, client.read(request)).await?;
        let stream = stream.ok_or_else(|| Fault::Missing(blob.digest.clone()))?;
        Ok(Incoming { digest: blob.digest.clone(), stream })
    }

    /// Sees that a blob is there and has the size that it is said to have, without reading it.
    ///
    /// # Errors
    /// `Missing`, `Wrong`, or `Host` as above.
    pub async fn check(&self, blob: &Descriptor) -> Result<(), Fault> {
        let mut client = ContentClient::new(self.channel.clone());
        let request = self.request(InfoRequest { digest: blob.digest.clone() });
        let info = answer("ask containerd for the image's content", client.info(request)).await?;
        let info = info.and_then(|answer| answer.info).ok_or_else(|| Fault::Missing(blob.digest.clone()))?;
        match u64::try_from(info.size).unwrap_or(u64::MAX).cmp(&blob.size) {
            Ordering::Equal => Ok(()),
            Ordering::Greater => Err(wrong(blob, "has more")),
            Ordering::Less => Err(wrong(blob, "has less")),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        request
    }
}

impl Blobs for Store {
    async fn read(&self, blob: &Descriptor) -> Result<Vec<u8>, Fault> {
        let mut arriving = Arriving::new(blob)?;
        let mut incoming = self.open(blob).await?;
        while let Some(chunk) = incoming.next().await? {
            arriving.take(&chunk)?;
        }
        arriving.end()
    }
}

/// The contents of a blob as they come, unchecked.
pub struct Incoming {
    digest: String,
    stream: Streaming<ReadContentResponse>,
}

impl Incoming {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// `Missing` when there is no such blob: the answer to a read begins before it is looked for.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        match tokio::time::timeout(ANSWER, self.stream.message()).await {
            Ok(Ok(chunk)) => Ok(chunk.map(|chunk| chunk.data)),
            Ok(Err(status)) if status.code() == Code::NotFound => Err(Fault::Missing(self.digest.clone())),
            Ok(Err(status)) => Err(refused(READING, &status).into()),
            Err(_) => Err(late(READING, ANSWER).into()),
        }
    }
}

/// A blob on its way.
struct Arriving<'a> {
    blob: &'a Descriptor,
    expected: &'a str,
    bytes: Vec<u8>,
    hash: Sha256,
}

impl<'a> Arriving<'a> {
    fn new(blob: &'a Descriptor) -> Result<Self, Fault> {
        let expected = blob.hex().map_err(Fault::Wrong)?;
        let mut bytes = Vec::new();
        let size = usize::try_from(blob.size).unwrap_or(usize::MAX);
        bytes
            .try_reserve_exact(size)
            .map_err(|e| Error::host("memory for the image's content", io::Error::other(e)))?;
        Ok(Self { blob, expected, bytes, hash: Sha256::new() })
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), Fault> {
        let room = self.blob.size.saturating_sub(self.bytes.len() as u64);
        if chunk.len() as u64 > room {
            return Err(wrong(self.blob, "has more"));
        }
        self.hash.update(chunk);
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    fn end(self) -> Result<Vec<u8>, Fault> {
        if (self.bytes.len() as u64) < self.blob.size {
            return Err(wrong(self.blob, "has less"));
        }
        let digest: String = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if digest != self.expected {
            return Err(Fault::Wrong(format!(
                "{}: it is damaged: its content has the digest {digest}",
                self.blob.digest
            )));
        }
        Ok(self.bytes)
    }
}

fn wrong(blob: &Descriptor, has: &str) -> Fault {
    Fault::Wrong(format!("{}: it {has} than the {} bytes it is said to have", blob.digest, blob.size))
}

/// An answer in time; `None` for "there is no such thing".
async fn answer<T>(
    what: &str,
    question: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Option<T>, Error> {
    match tokio::time::timeout(ANSWER, question).await {
        Ok(Ok(answer)) => Ok(Some(answer.into_inner())),
        Ok(Err(status)) if status.code() == Code::NotFound => Ok(None),
        Ok(Err(status)) => Err(refused(what, &status)),
        Err(_) => Err(late(what, ANSWER)),
    }
}

fn refused(what: &str, status: &Status) -> Error {
    let why = match status.source() {
        Some(source) => format!("{}: {}", status.message(), root_cause(source)),
        None => status.message().to_owned(),
    };
    Error::host(what, io::Error::other(why))
}

/// The innermost error: those around it say "transport error".
fn root_cause(mut error: &(dyn StdError + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of "hello".
    const HELLO: &str = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn arrive(digest: &str, size: u64, chunks: &[&str]) -> Result<Vec<u8>, String> {
        let blob = Descriptor { digest: digest.into(), size, ..Default::default() };
        let arrive = || {
            let mut arriving = Arriving::new(&blob)?;
            chunks.iter().try_for_each(|chunk| arriving.take(chunk.as_bytes()))?;
            arriving.end()
        };
        arrive().map_err(|fault: Fault| fault.about("image").to_string())
    }

    #[test]
    fn only_what_was_promised_arrives() {
        assert_eq!(arrive(HELLO, 5, &["hel", "", "lo"]).unwrap(), b"hello");
        for (digest, size, chunks, words) in [
            (HELLO, 5, &["hellish"][..], "has more than the 5 bytes"),
            (HELLO, 5, &["hello", "!"], "has more than the 5 bytes"),
            (HELLO, 6, &["hello"], "has less than the 6 bytes"),
            (HELLO, 5, &["jello"], "damaged"),
            ("sha512:00", 5, &[], "sha256"),
            ("sha256:00", 5, &[], "64 hexadecimal digits"),
            (&HELLO.to_uppercase().replace("SHA", "sha"), 5, &["hello"], "64 hexadecimal digits"),
            ("sha256:../../../../../../../../../../../../../../../../../../../../../etc", 5, &[], "64 hexadecimal"),
            (HELLO, u64::MAX, &[], "memory"),
        ] {
            let error = arrive(digest, size, chunks).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
