//! Names of objects: cheap to clone, and not to be mixed up.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) struct $name(Arc<str>);

        impl $name {
            pub(crate) fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) struct $name {
            pub(crate) namespace: NamespaceName,
            pub(crate) name: Arc<str>,
        }

        impl $name {
            pub(crate) fn new(namespace: &str, name: &str) -> Self {
                Self {
                    namespace: namespace.into(),
                    name: name.into(),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}/{}", self.namespace, self.name)
            }
        }
    };
}

name! {
    /// Name of a Node, and so of its AmbientNode.
    NodeName
}
name! {
    /// Name of a Namespace.
    NamespaceName
}
name! {
    /// UID of a Pod: unlike its name, never used again.
    PodUid
}
name! {
    /// Name of a resource of discovery: a pod's UID, an endpoint's path or `namespace/hostname`.
    ResourceName
}
name! {
    /// Another name that a client may ask a resource by: `network/address`.
    Alias
}

key! {
    /// Namespace and name of a Pod.
    PodKey
}
key! {
    /// Namespace and name of a Service.
    ServiceKey
}
key! {
    /// Namespace and name of an EndpointSlice.
    SliceKey
}
