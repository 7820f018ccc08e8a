//! The first message of a proxy: who it is, and a descriptor of its network namespace beside it
//! (SCM_RIGHTS, unix(7)).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use protocol::node::{Hello, proxy_message};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::frame::{self, FrameError, HEADER};

/// Descriptors that one read can take in; more than one is a mistake, and each is closed.
const MAX_DESCRIPTORS: usize = 8;

/// A hello that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    /// The connection ended or broke.
    #[error("read the hello")]
    Read(#[source] io::Error),
    /// It cannot be understood.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It is another message.
    #[error("the first message is no hello")]
    NotHello,
    /// It came without the descriptor, or with several.
    #[error("the hello came with {0} descriptors, not with that of the network namespace")]
    Descriptors(usize),
}

/// Receives it.
pub(crate) async fn receive(stream: &UnixStream) -> Result<(Hello, OwnedFd), HelloError> {
    let mut descriptors = Vec::new();
    let mut header = [0; HEADER];
    fill(stream, &mut header, &mut descriptors).await?;
    let mut message = vec![0; frame::announced(header)?];
    fill(stream, &mut message, &mut descriptors).await?;
    let Some(proxy_message::Message::Hello(hello)) = frame::decode(&message)? else {
        return Err(HelloError::NotHello);
    };
    let count = descriptors.len();
    match descriptors.pop() {
        Some(descriptor) if count == 1 => Ok((hello, descriptor)),
        _ => Err(HelloError::Descriptors(count)),
    }
}

/// Fills the buffer, and keeps the descriptors that come along.
async fn fill(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<(), HelloError> {
    let mut filled = 0;
    while filled < buffer.len() {
        let (read, received) = stream
            .async_io(Interest::READABLE, || {
                read_once(stream.as_raw_fd(), &mut buffer[filled..])
            })
            .await
            .map_err(HelloError::Read)?;
        descriptors.extend(received);
        if read == 0 {
            return Err(HelloError::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        filled += read;
    }
    Ok(())
}

fn read_once(socket: RawFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut ancillary = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket,
        &mut slices,
        Some(&mut ancillary),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    // The kernel has closed those that found no room.
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            descriptors.extend(numbers.into_iter().map(owned));
        }
    }
    Ok((message.bytes, descriptors))
}

/// A descriptor that the kernel has just installed for us.
#[allow(
    unsafe_code,
    reason = "recvmsg hands descriptors over as plain numbers"
)]
fn owned(number: RawFd) -> OwnedFd {
    // SAFETY: the number comes from SCM_RIGHTS of this very call; nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::IoSlice;

    use nix::sys::socket::{ControlMessage, sendmsg};
    use prost::Message;
    use protocol::node::ProxyMessage;

    use super::*;

    fn hello() -> Hello {
        Hello {
            version: "1".to_owned(),
            pod_uid: "u".to_owned(),
            pod_name: "p".to_owned(),
        }
    }

    fn framed(message: proxy_message::Message) -> Vec<u8> {
        let message = ProxyMessage {
            message: Some(message),
        }
        .encode_to_vec();
        let mut bytes = u32::try_from(message.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(message);
        bytes
    }

    async fn said(bytes: &[u8], descriptors: usize) -> Result<(Hello, OwnedFd), HelloError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..descriptors)
            .map(|_| File::open("/proc/self/ns/net").unwrap())
            .collect();
        let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() {
            &[][..]
        } else {
            &rights[..]
        };
        sendmsg::<()>(
            theirs.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop(theirs);
        receive(&ours).await
    }

    #[tokio::test]
    async fn a_hello_brings_its_descriptor() {
        let bytes = framed(proxy_message::Message::Hello(hello()));
        let (received, _) = said(&bytes, 1).await.unwrap();
        assert_eq!(received, hello());
    }

    #[tokio::test]
    async fn a_hello_without_its_descriptor_or_with_two_is_refused() {
        let bytes = framed(proxy_message::Message::Hello(hello()));
        assert!(matches!(
            said(&bytes, 0).await,
            Err(HelloError::Descriptors(0))
        ));
        assert!(matches!(
            said(&bytes, 2).await,
            Err(HelloError::Descriptors(2))
        ));
    }

    #[tokio::test]
    async fn another_first_message_and_half_a_message_are_refused() {
        let report = framed(proxy_message::Message::Report(
            protocol::node::Report::default(),
        ));
        assert!(matches!(said(&report, 1).await, Err(HelloError::NotHello)));
        let bytes = framed(proxy_message::Message::Hello(hello()));
        assert!(matches!(
            said(&bytes[..bytes.len() - 1], 1).await,
            Err(HelloError::Read(_))
        ));
        assert!(matches!(
            said(&[0xff; 8], 1).await,
            Err(HelloError::Frame(FrameError::TooLong(_)))
        ));
    }
}
