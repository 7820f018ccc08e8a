//! Frames of the socket: a length of four bytes, big endian, and a message. Never longer than the
//! bound, whatever the length says.

use bytes::Bytes;
use prost::Message;
use protocol::node::{AgentMessage, ProxyMessage, proxy_message};
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// Longest message of a proxy: far more than a report about every pod that a node can hold.
pub(crate) const LONGEST: usize = 4 << 20;

/// Bytes of the length before a message.
pub(crate) const HEADER: usize = 4;

/// A message that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    /// It is too long.
    #[error("a message of {0} bytes is announced, {LONGEST} are the most")]
    TooLong(usize),
    /// It is no message.
    #[error("a message that is not of ambit.node.v1")]
    Decode(#[from] prost::DecodeError),
}

/// The stream's frames.
pub(crate) fn framed(stream: UnixStream) -> Framed<UnixStream, LengthDelimitedCodec> {
    let codec = LengthDelimitedCodec::builder()
        .length_field_length(HEADER)
        .max_frame_length(LONGEST)
        .new_codec();
    Framed::new(stream, codec)
}

/// Length of the message that a header announces.
pub(crate) fn announced(header: [u8; HEADER]) -> Result<usize, FrameError> {
    let length = usize::try_from(u32::from_be_bytes(header)).unwrap_or(usize::MAX);
    if length > LONGEST {
        return Err(FrameError::TooLong(length));
    }
    Ok(length)
}

/// A proxy's message.
pub(crate) fn decode(bytes: &[u8]) -> Result<Option<proxy_message::Message>, FrameError> {
    Ok(ProxyMessage::decode(bytes)?.message)
}

/// An agent's message.
pub(crate) fn encode(message: &AgentMessage) -> Bytes {
    message.encode_to_vec().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protocol::node::{Report, WorkloadReport};

    use super::*;

    #[test]
    fn a_header_that_announces_too_much_is_refused() {
        assert!(matches!(announced([0xff; 4]), Err(FrameError::TooLong(_))));
        assert_eq!(announced([0, 0, 1, 0]).unwrap(), 256);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn no_header_announces_more_than_the_bound(header in any::<[u8; 4]>()) {
            if let Ok(length) = announced(header) {
                prop_assert!(length <= LONGEST);
            }
        }

        #[test]
        fn a_report_is_read_as_it_was_written(generation in any::<u64>(), uid in ".*", state in any::<i32>()) {
            let report = Report {
                generation,
                listeners: Vec::new(),
                workloads: vec![WorkloadReport { uid, state, message: String::new() }],
                ending: false,
            };
            let message = Some(proxy_message::Message::Report(report));
            let bytes = ProxyMessage { message: message.clone() }.encode_to_vec();
            prop_assert_eq!(decode(&bytes).unwrap(), message);
        }
    }
}
