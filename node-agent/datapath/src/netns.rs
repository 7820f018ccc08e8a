//! A network namespace to do things in, from a thread that enters it and ends there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};

/// A network namespace: the one this process runs in, or one it holds a descriptor of.
#[derive(Clone, Debug)]
pub struct Netns(Option<Arc<OwnedFd>>);

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
