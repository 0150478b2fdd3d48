//! Layers of images, which go by their digests: read when they have to be, and never when somebody knows the code.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest as _, Sha256};
use troupe_actors::guest::{Bounds, Code, Programs};
use troupe_actors::{Content, Error};

use crate::support::{COUNTED, Fixture, concurrent, module, server};

/// A layer that counts how often it is read.
#[derive(Debug)]
struct Layer {
    digest: [u8; 32],
    bytes: Result<Vec<u8>, &'static str>,
    reads: AtomicUsize,
}

impl Layer {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        let digest = Sha256::digest(&bytes).into();
        Arc::new(Self { digest, bytes: Ok(bytes), reads: AtomicUsize::default() })
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }
}

impl Content for Layer {
    fn digest(&self) -> [u8; 32] {
        self.digest
    }

    fn read(&self) -> troupe_actors::Result<Vec<u8>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.bytes.clone().map_err(|why| Error::Program(why.into()))
    }
}

async fn load(programs: &Programs<Code>, layer: &Arc<Layer>) -> Arc<Code> {
    programs.load_layer("/app.wasm", layer.clone(), Bounds::default()).await.unwrap()
}

#[tokio::test]
async fn a_layer_is_read_once_for_all_processes_that_find_its_code() {
    let fixture = Fixture::scripted(COUNTED);
    for (wasm, compiled) in
        [(module(1), 1), (server(), 2), (concurrent(), 3), (wat::parse_str("(component)").unwrap(), 4)]
    {
        let (first, layer) = (fixture.programs(), Layer::new(wasm));
        let loaded = load(&first, &layer).await;
        assert!(Arc::ptr_eq(&loaded, &load(&first, &layer).await));
        let second = load(&fixture.programs(), &layer).await;
        assert_eq!(matches!(*loaded, Code::Module(_)), matches!(*second, Code::Module(_)));
        assert_eq!((layer.reads(), fixture.runs()), (1, compiled));
    }
}

#[tokio::test]
async fn the_bounds_of_a_server_are_looked_for_apart() {
    let fixture = Fixture::scripted(COUNTED);
    let (programs, layer) = (fixture.programs(), Layer::new(server()));
    for (bounds, runs) in [(Bounds::Explicit, 1), (Bounds::Guarded, 2), (Bounds::Explicit, 2)] {
        programs.load_layer("/app.wasm", layer.clone(), bounds).await.unwrap();
        assert_eq!(fixture.runs(), runs);
    }
}

#[tokio::test]
async fn a_file_and_a_layer_of_the_same_bytes_are_one_program() {
    let fixture = Fixture::new();
    let (programs, layer) = (fixture.programs(), Layer::new(module(1)));
    let file = programs.load("/file.wasm", module(1), Bounds::default()).await.unwrap();
    assert!(Arc::ptr_eq(&file, &load(&programs, &layer).await));
    assert_eq!(layer.reads(), 0);
}

#[tokio::test]
async fn code_that_is_gone_or_damaged_is_compiled_from_the_layer_again() {
    let fixture = Fixture::scripted(COUNTED);
    let layer = Layer::new(module(1));
    let programs = fixture.programs();
    drop(load(&programs, &layer).await);
    std::fs::remove_file(&fixture.entries()[0]).unwrap();
    // This process knows what it is, and has nothing of it left.
    drop(load(&programs, &layer).await);
    assert_eq!((layer.reads(), fixture.runs()), (2, 2));
    let entry = &fixture.entries()[0];
    let mut code = std::fs::read(entry).unwrap();
    code[1000] ^= 1;
    std::fs::write(entry, code).unwrap();
    drop(load(&fixture.programs(), &layer).await);
    assert_eq!((layer.reads(), fixture.runs()), (3, 3));
}

#[tokio::test]
async fn text_is_read_at_every_start() {
    let fixture = Fixture::new();
    let (programs, layer) = (fixture.programs(), Layer::new(b"(module)".to_vec()));
    let loaded = load(&programs, &layer).await;
    assert!(Arc::ptr_eq(&loaded, &load(&programs, &layer).await));
    assert_eq!(layer.reads(), 2);
}

/// What is compiled under a digest has it, whoever reads it and whatever was known before.
#[tokio::test]
async fn other_bytes_than_those_of_the_digest_are_never_compiled() {
    let fixture = Fixture::scripted(COUNTED);
    let programs = fixture.programs();
    let lie =
        |digest: &Arc<Layer>, bytes| Arc::new(Layer { digest: digest.digest, bytes, reads: AtomicUsize::default() });
    let known = Layer::new(module(1));
    drop(load(&programs, &known).await);
    std::fs::remove_file(&fixture.entries()[0]).unwrap();
    for (layer, words) in [
        (lie(&known, Ok(module(2))), "another digest"),
        (lie(&Layer::new(module(3)), Ok(module(2))), "another digest"),
        (lie(&known, Err("image a: it is gone")), "image a: it is gone"),
    ] {
        let error = programs.load_layer("/app.wasm", layer.clone(), Bounds::default()).await.err().unwrap().to_string();
        assert!(error.contains(words) && layer.reads() == 1, "{error}");
    }
    assert_eq!((fixture.runs(), fixture.entries().len()), (1, 0));
    load(&programs, &known).await;
}
