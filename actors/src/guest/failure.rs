//! Why a program could not be loaded.
//!
//! Every variant has the same two fields: the file in the image and a sentence. The file is filled in last, by
//! `Programs::load`: equal modules are loaded once for all who ask, and each asker has a name of its own for it.

/// A program that cannot run here. A variant exists because somebody reacts differently to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Not a wasm binary at all, or a form that is refused: the image holds the wrong file.
    #[error("{file}: {why}")]
    NotWasm { file: String, why: String },
    /// A wasm binary that does not validate, or that uses what this build does not support.
    #[error("{file}: not a valid WebAssembly program: {why}")]
    Invalid { file: String, why: String },
    /// Well-formed, but it asks for an import that nobody provides or lacks the export to start.
    #[error("{file}: {why}")]
    Unlinkable { file: String, why: String },
    /// A limit of ours was reached; the sentence names it and the setting that raises it.
    #[error("{file}: {why}")]
    TooExpensive { file: String, why: String },
    /// The cache's folder is not safe to run code from: the operator has to look.
    #[error("{file}: {why}")]
    UnsafeCache { file: String, why: String },
    /// What lies in the image is not what its manifest says.
    #[error("{why}")]
    Damaged { file: String, why: String },
    /// Whoever holds the image does not hand it out.
    #[error("{file}: {why}")]
    Unreachable { file: String, why: String },
    /// Nothing the user did: the worker crashed, the system refused something.
    #[error("{file}: could not be compiled or loaded: {why}")]
    Internal { file: String, why: String },
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $variant:ident;)*) => {
        $($(#[$doc])* pub fn $name(why: impl Into<String>) -> Self {
            Self::$variant { file: String::new(), why: why.into() }
        })*
    };
}

impl LoadError {
    constructors! {
        /// See [`LoadError::NotWasm`].
        not_wasm => NotWasm;
        /// See [`LoadError::Invalid`].
        invalid => Invalid;
        /// See [`LoadError::Unlinkable`].
        unlinkable => Unlinkable;
        /// See [`LoadError::TooExpensive`].
        too_expensive => TooExpensive;
        /// See [`LoadError::UnsafeCache`].
        unsafe_cache => UnsafeCache;
        /// See [`LoadError::Damaged`].
        damaged => Damaged;
        /// See [`LoadError::Unreachable`].
        unreachable => Unreachable;
        /// See [`LoadError::Internal`].
        internal => Internal;
    }

    /// The same error, about the file of this name.
    pub fn about(mut self, name: &str) -> Self {
        let (Self::NotWasm { file, .. }
        | Self::Invalid { file, .. }
        | Self::Unlinkable { file, .. }
        | Self::TooExpensive { file, .. }
        | Self::UnsafeCache { file, .. }
        | Self::Damaged { file, .. }
        | Self::Unreachable { file, .. }
        | Self::Internal { file, .. }) = &mut self;
        *file = name.to_owned();
        self
    }
}
