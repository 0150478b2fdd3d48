//! Every way wasm is packed, run through CRI as a kubelet does it: the CNCF's artifact, which `ctr run` refuses, too.

use anyhow::{Result, ensure};

use super::images::image_of;
use super::pods::{addr, expect_empty, get};
use crate::common::containerd::Containerd;
use crate::common::cri::{Kubelet, NAMESPACE};
use crate::common::image::Kind;
use crate::common::{Outcome, guests};

pub const CASES: crate::common::Cases = &[
    ("images_of_files_run", |containerd| runs(containerd, Kind::Rootfs)),
    ("images_of_layers_run", |containerd| runs(containerd, Kind::Layers)),
    ("artifacts_run", |containerd| runs(containerd, Kind::Artifact)),
];

/// A command and a server, each the only module of its image.
fn runs(containerd: &Containerd, kind: Kind) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let image = |guest: &str| -> Result<String> {
        let name = format!("cri-{}-{}", format!("{kind:?}").to_lowercase(), guest.trim_end_matches(".wasm"));
        let client = containerd.namespace(NAMESPACE);
        let reference = image_of(&client, kind, &name, &[&guests::built(guest)?], &[])?;
        kubelet.knows(&reference)?;
        Ok(reference)
    };
    let pod = kubelet.run(kubelet.pod("packed")?)?;
    let (kit, hello) = (image("kit-component.wasm")?, image("hello-http.wasm")?);
    let command = pod.container("command", &kit, &["kit-component.wasm", "echo", "unpacked"], |_| {})?;
    command.start()?;
    ensure!(command.expect(0)? == "unpacked\n", "{:?}", command.log());
    let server = pod.container("server", &hello, &["/"], |_| {})?;
    server.start()?;
    get(&kubelet, addr(&pod, 8080)?, "/")?.expect(200, "hello world\n")?;
    pod.remove()?;
    expect_empty(&kubelet)
}
