//! Bytes that both sides can make: a byte that is lost, doubled or moved changes their sum.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use hyper::body::{Frame, SizeHint};
use sha2::{Digest, Sha256};

/// Size of a chunk of a long body, in bytes.
pub(crate) const CHUNK: u64 = 64 * 1024;

const WORD: u64 = 8;

/// The pattern's bytes from `offset`, which is a multiple of [`CHUNK`]; at most one chunk of them.
pub(crate) fn chunk(offset: u64, length: u64) -> Bytes {
    let length = length.min(CHUNK);
    let mut bytes = BytesMut::with_capacity(CHUNK as usize);
    for word in 0..length.div_ceil(WORD) {
        // A multiplier without small factors spreads the counter over all eight bytes.
        bytes.put_u64_le((offset / WORD + word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    bytes.truncate(length as usize);
    bytes.freeze()
}

/// SHA-256 of the pattern's first bytes, in hexadecimal.
pub(crate) fn sum(length: u64) -> String {
    let mut sum = Sha256::new();
    let mut offset = 0;
    while offset < length {
        let bytes = chunk(offset, length - offset);
        offset += bytes.len() as u64;
        sum.update(&bytes);
    }
    hex(sum)
}

/// The result of a sum, in hexadecimal.
pub(crate) fn hex(sum: Sha256) -> String {
    format!("{:x}", sum.finalize())
}

/// A body of the pattern's bytes, made while it is sent.
pub(crate) struct Body {
    offset: u64,
    length: u64,
}

impl Body {
    pub(crate) fn new(length: u64) -> Self {
        Self { offset: 0, length }
    }

    fn rest(&self) -> u64 {
        self.length - self.offset
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.rest() == 0 {
            return Poll::Ready(None);
        }
        let bytes = chunk(self.offset, self.rest());
        self.offset += bytes.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_is_no_multiple_of_a_word_is_kept() {
        assert_eq!(chunk(0, 13).len(), 13);
        assert_eq!(chunk(0, 13), chunk(0, 16).slice(..13));
    }

    #[test]
    fn two_chunks_differ() {
        assert_ne!(chunk(0, CHUNK), chunk(CHUNK, CHUNK));
    }

    #[test]
    fn the_sum_is_that_of_the_chunks_one_after_another() {
        let whole = [chunk(0, CHUNK), chunk(CHUNK, 5)].concat();
        assert_eq!(sum(CHUNK + 5), hex(Sha256::new_with_prefix(whole)));
    }
}
