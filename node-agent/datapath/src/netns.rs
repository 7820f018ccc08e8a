//! A network namespace to do things in, from a thread that enters it and ends there.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::family::Family;

/// A network namespace: the one this process runs in, or one it holds a descriptor of.
#[derive(Clone, Debug)]
pub struct Netns(Option<Arc<OwnedFd>>);

/// What tells network namespaces apart: the device and the inode of their file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

/// A descriptor from elsewhere that is not what it was given for.
#[derive(Debug, thiserror::Error)]
pub enum NotNetns {
    /// The kernel does not say what it is.
    #[error("ask what the descriptor is of")]
    Ask(#[source] io::Error),
    /// It is no namespace at all.
    #[error("the descriptor is of a file and not of a network namespace")]
    File,
    /// It is a namespace of another kind, or one that cannot be entered.
    #[error("enter what should be a network namespace")]
    Enter(#[source] io::Error),
}

impl Netns {
    /// The namespace of this process.
    #[must_use]
    pub fn own() -> Self {
        Self(None)
    }

    /// The namespace of a descriptor (`/proc/PID/ns/net`).
    #[must_use]
    pub fn of(descriptor: OwnedFd) -> Self {
        Self(Some(Arc::new(descriptor)))
    }

    /// The namespace of a descriptor that somebody else handed over.
    ///
    /// # Errors
    /// If it is of something else.
    pub fn received(descriptor: OwnedFd) -> Result<Self, NotNetns> {
        let system = fstatfs(&descriptor).map_err(|errno| NotNetns::Ask(errno.into()))?;
        // A process descriptor could be entered as well.
        if system.filesystem_type() != NSFS_MAGIC {
            return Err(NotNetns::File);
        }
        let netns = Self::of(descriptor);
        // The kernel refuses a namespace of another kind.
        netns.run(|| ()).map_err(NotNetns::Enter)?;
        Ok(netns)
    }

    /// The namespace of a file, for example `/run/netns/NAME`.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn open(path: &str) -> io::Result<Self> {
        Ok(Self::of(File::open(path)?.into()))
    }

    /// The descriptor, if it is another namespace than this process's own.
    #[must_use]
    pub fn descriptor(&self) -> Option<&OwnedFd> {
        self.0.as_deref()
    }

    /// What tells it apart from others.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn id(&self) -> io::Result<NetnsId> {
        let metadata = match self.descriptor() {
            Some(descriptor) => fs::metadata(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))?,
            None => fs::metadata("/proc/self/ns/net")?,
        };
        Ok(NetnsId {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    /// The families that its kernel knows: IPv6 can be switched off at boot.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn families(&self) -> io::Result<&'static [Family]> {
        let has_ipv6 = self.run(|| Path::new("/proc/thread-self/net/if_inet6").exists())?;
        Ok(if has_ipv6 {
            &Family::ALL
        } else {
            &[Family::V4]
        })
    }

    /// Runs `work` inside.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let Some(descriptor) = self.0.clone() else {
            return Ok(work());
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || -> io::Result<T> {
                setns(descriptor.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            thread
                .join()
                .map_err(|_| io::Error::other("the thread in the namespace died"))?
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_descriptor_of_a_network_namespace_is_taken_for_one() {
        let own = File::open("/proc/self/ns/net").unwrap();
        let received = Netns::received(own.into()).unwrap();
        assert_eq!(received.id().unwrap(), Netns::own().id().unwrap());
        let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
        assert!(matches!(
            Netns::received(open("/dev/null")),
            Err(NotNetns::File)
        ));
        assert!(matches!(
            Netns::received(open("/proc/self/ns/mnt")),
            Err(NotNetns::Enter(_))
        ));
    }
}
