//! How messages become bytes and bytes become messages.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::{Buf, Bytes};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

/// From this size on, in bytes, the memory of a message is given back.
const LARGE: usize = 16 << 10;

/// Prost's codec for streams that begin with a large message and live for days: a client of discovery says first what
/// it has, which in a large cluster is some megabytes. Without this a stream keeps the memory of its largest message.
#[derive(Clone, Debug)]
pub struct SparingCodec<T, U>(PhantomData<(T, U)>);

/// Decodes as Prost does.
#[derive(Clone, Debug)]
pub struct SparingDecoder<U> {
    /// The bytes of the last message, if it was large. While we hold them too the stream cannot use their memory for what
    /// comes next, and takes a new and small one; with the next message nobody holds them.
    last: Bytes,
    _decodes: PhantomData<U>,
}

impl<T, U> Default for SparingCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SparingCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = SparingDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        SparingDecoder {
            last: Bytes::new(),
            _decodes: PhantomData,
        }
    }
}

impl<U: Message + Default> Decoder for SparingDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        self.last = Bytes::new();
        let decoded = if from.remaining() < LARGE {
            U::decode(from)
        } else {
            self.last = from.copy_to_bytes(from.remaining());
            U::decode(&*self.last)
        };
        // The code that gRPC gives to bytes that are no message.
        decoded
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}
