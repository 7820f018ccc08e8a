//! What has come on a stream and is not written yet, so that many small frames go in one write.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use h2::RecvStream;

/// Frames that are taken together at most.
const FRAMES: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Chunks(VecDeque<Bytes>);

impl Chunks {
    /// Takes what is there, at least something; says whether the stream has ended.
    pub(super) fn poll_fill(
        &mut self,
        receive: &mut RecvStream,
        context: &mut Context<'_>,
    ) -> Poll<Result<bool, h2::Error>> {
        while self.0.len() < FRAMES {
            match receive.poll_data(context) {
                Poll::Ready(Some(Ok(data))) => self.push(data),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(true)),
                Poll::Pending if self.0.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(false))
    }

    fn push(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.0.push_back(data);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn length(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    pub(super) fn slices(&self) -> [IoSlice<'_>; FRAMES] {
        let mut slices = [IoSlice::new(&[]); FRAMES];
        for (slice, data) in slices.iter_mut().zip(&self.0) {
            *slice = IoSlice::new(data);
        }
        slices
    }

    /// The first so many bytes are written.
    pub(super) fn advance(&mut self, mut written: usize) {
        while let Some(first) = self.0.front_mut() {
            if first.len() > written {
                return first.advance(written);
            }
            written -= first.len();
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_is_written_once_and_in_order(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..FRAMES),
            sizes in prop::collection::vec(1..30_usize, 1..10),
        ) {
            let mut chunks = Chunks::default();
            frames.iter().for_each(|frame| chunks.push(frame.clone().into()));
            let mut written = Vec::new();
            let mut sizes = sizes.into_iter().cycle();
            while !chunks.is_empty() {
                let all: Vec<u8> = chunks.slices().iter().flat_map(|slice| slice.to_vec()).collect();
                prop_assert_eq!(all.len(), chunks.length());
                let now = sizes.next().unwrap().min(all.len());
                written.extend_from_slice(&all[..now]);
                chunks.advance(now);
            }
            prop_assert_eq!(written, frames.concat());
        }
    }
}
