//! The first message, with the descriptor of our network namespace as ancillary data.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

const NAMESPACE: &str = "/proc/self/ns/net";

/// A hello that was not said.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("open {NAMESPACE}")]
    Namespace(#[source] io::Error),
    #[error("send the message")]
    Send(#[from] io::Error),
    #[error("the message is too long")]
    Length,
}

/// Sends the message with its length before it, and the descriptor with its first bytes.
pub(super) async fn send(stream: &mut UnixStream, message: &[u8]) -> Result<(), HelloError> {
    let namespace = File::open(NAMESPACE).map_err(HelloError::Namespace)?;
    let length = u32::try_from(message.len()).map_err(|_| HelloError::Length)?;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(message);
    let descriptors = [namespace.as_raw_fd()];
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let rights = [ControlMessage::ScmRights(&descriptors)];
            let data = [IoSlice::new(&bytes)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            let sent = sendmsg::<UnixAddr>(stream.as_raw_fd(), &data, &rights, flags, None);
            sent.map_err(io::Error::from)
        })
        .await?;
    stream
        .write_all(bytes.get(sent..).unwrap_or_default())
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::os::unix::fs::MetadataExt;

    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    use super::*;

    #[tokio::test]
    #[allow(unsafe_code)]
    async fn the_agent_gets_a_descriptor_of_our_namespace() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        send(&mut ours, b"hello").await.unwrap();
        theirs.readable().await.unwrap();
        let mut bytes = [0; 64];
        let mut data = [IoSliceMut::new(&mut bytes)];
        let mut space = cmsg_space!([std::os::fd::RawFd; 1]);
        let got = recvmsg::<UnixAddr>(
            theirs.as_raw_fd(),
            &mut data,
            Some(&mut space),
            MsgFlags::empty(),
        );
        let got = got.unwrap();
        let rights = got.cmsgs().unwrap().next().unwrap();
        let ControlMessageOwned::ScmRights(descriptors) = rights else {
            panic!("no descriptor: {rights:?}");
        };
        // SAFETY: the kernel has just made this descriptor for us.
        let namespace = unsafe { OwnedFd::from_raw_fd(descriptors[0]) };
        let handed = File::from(namespace).metadata().unwrap().ino();
        assert_eq!(handed, std::fs::metadata(NAMESPACE).unwrap().ino());
        let length = got.bytes;
        assert_eq!(&bytes[..length], b"\0\0\0\x05hello");
    }
}
