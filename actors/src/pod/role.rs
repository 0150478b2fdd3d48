//! What a container is to its pod, in the words of CRI (containerd's annotations).

use std::collections::HashMap;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// What a container is to its pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Role {
    /// It was not made through CRI: a pod of its own.
    #[default]
    Alone,
    /// It is the pod: namespaces, and nothing that runs.
    Sandbox,
    /// It belongs to the pod whose sandbox has this id.
    Member(String),
}

impl Role {
    /// The role that the annotations of a container tell of.
    pub fn of(annotations: &HashMap<String, String>) -> Self {
        let kind = annotations.get(CONTAINER_TYPE).map(String::as_str);
        match (kind, annotations.get(SANDBOX_ID)) {
            (Some("sandbox"), _) => Self::Sandbox,
            (Some("container"), Some(sandbox)) => Self::Member(sandbox.clone()),
            _ => Self::Alone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_cri_are_understood() {
        let role = |pairs: &[(&str, &str)]| {
            Role::of(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
        };
        assert_eq!(role(&[]), Role::Alone);
        assert_eq!(role(&[(CONTAINER_TYPE, "sandbox"), (SANDBOX_ID, "p")]), Role::Sandbox);
        assert_eq!(role(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p")]), Role::Member("p".into()));
        assert_eq!(role(&[(CONTAINER_TYPE, "container")]), Role::Alone);
        assert_eq!(role(&[(SANDBOX_ID, "p")]), Role::Alone);
    }
}
