//! Every way wasm is packed, run through CRI as a kubelet does it: the CNCF's artifact, which `ctr run` refuses, too.

use anyhow::{Result, ensure};

use super::images::{KITS, forms, image_of, nothing};
use super::pods::{addr, expect_empty, get};
use crate::common::containerd::Containerd;
use crate::common::cri::{Kubelet, NAMESPACE};
use crate::common::image::Kind;
use crate::common::{Outcome, guests};

pub const CASES: crate::common::Cases = &[
    ("images_of_files_run", |containerd| runs(containerd, Kind::Rootfs)),
    ("images_of_layers_run", |containerd| runs(containerd, Kind::Layers)),
    ("artifacts_run", |containerd| runs(containerd, Kind::Artifact)),
    ("artifacts_run_by_every_entrypoint", entrypoints),
];

/// An image with one module, which CRI knows.
fn image(kubelet: &Kubelet<'_>, kind: Kind, guest: &str) -> Result<String> {
    let name = format!("cri-{}-{}", format!("{kind:?}").to_lowercase(), guest.trim_end_matches(".wasm"));
    let client = kubelet.containerd.namespace(NAMESPACE);
    let reference = image_of(&client, kind, &name, &[&guests::built(guest)?], &[])?;
    kubelet.knows(&reference)?;
    Ok(reference)
}

/// A command and a server, each the only module of its image.
fn runs(containerd: &Containerd, kind: Kind) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let image = |guest| image(&kubelet, kind, guest);
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

/// Module, component and server; what `images` does with the other kinds.
fn entrypoints(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("entrypoints")?)?;
    for kit in KITS {
        let image = image(&kubelet, Kind::Artifact, kit)?;
        let others = ["/other.wasm".to_owned(), "0".to_owned()];
        for (number, form) in forms(kit).into_iter().chain(nothing(kit)).chain(others).enumerate() {
            let name = format!("{}-{number}", kit.trim_end_matches(".wasm"));
            let container = pod.container(&name, &image, &[&form, "args"], |_| {})?;
            container.start()?;
            ensure!(container.expect(0)? == format!("{form}\nargs\n"), "{kit} {form:?}: {:?}", container.log());
            container.remove()?;
        }
    }
    let hello = image(&kubelet, Kind::Artifact, "hello-http.wasm")?;
    for (number, form) in ["/hello-http.wasm", "hello-http.wasm", "./hello-http.wasm", "/", "0"].into_iter().enumerate()
    {
        let server = pod.container(&format!("hello-{number}"), &hello, &[form], |_| {})?;
        server.start()?;
        get(&kubelet, addr(&pod, 8080)?, "/")?.expect(200, "hello world\n")?;
        server.stop(std::time::Duration::from_secs(10))?;
        server.remove()?;
    }
    pod.remove()?;
    expect_empty(&kubelet)
}
