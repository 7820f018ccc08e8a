//! Bytes both ways until both directions have ended. A half that ended stays half-closed; a
//! connection that broke is reset at the other side, so that nobody takes it for complete.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio_util::io::poll_read_buf;

use crate::socket;

mod chunks;

use chunks::Chunks;

/// Size of a read at first; most connections are small.
const BUFFER_SMALL: usize = 4 * 1024;
/// Size of a read once a connection turned out to be bulky.
const BUFFER_LARGE: usize = 256 * 1024;
/// A DATA frame below this is small: peers count those.
const SMALL_FRAME: usize = 256;
/// So many small frames in a row, without an answer, are sent as they come.
const SMALL_FRAMES: u32 = 64;
/// Then the bytes of this long go together.
const GATHER: Duration = Duration::from_millis(1);

/// How many bytes went each way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Transferred {
    /// From the one who connected.
    pub(crate) sent: u64,
    /// To the one who connected.
    pub(crate) received: u64,
}

/// A connection that ended before both sides were done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("socket: {0}")]
    Socket(#[from] io::Error),
    #[error("tunnel: {0}")]
    Tunnel(#[from] h2::Error),
    #[error("tunnel: the peer reset the stream: {0}")]
    Reset(Reason),
    #[error("tunnel: the peer closed the stream")]
    Closed,
}

/// Joins two sockets: `client` connected to us, `server` we connected to.
pub(crate) async fn sockets(
    mut client: TcpStream,
    mut server: TcpStream,
) -> (Transferred, Result<(), CopyError>) {
    let mut transferred = Transferred::default();
    let result = {
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let out = relay(&mut from_client, &mut to_server, &mut transferred.sent);
        let back = relay(&mut from_server, &mut to_client, &mut transferred.received);
        tokio::try_join!(out, back).map(drop)
    };
    if result.is_err() {
        socket::reset(client);
        socket::reset(server);
    }
    (transferred, result)
}

/// Joins a socket and a stream of a tunnel. `sent` counts what was read from the socket.
pub(crate) async fn tunnel(
    mut socket: TcpStream,
    mut send: SendStream<Bytes>,
    receive: RecvStream,
) -> (Transferred, Result<(), CopyError>) {
    let mut transferred = Transferred::default();
    let unanswered = AtomicU32::new(0);
    let result = {
        let (mut read, mut write) = socket.split();
        let out = to_stream(&mut read, &mut send, &unanswered, &mut transferred.sent);
        let back = from_stream(receive, &mut write, &unanswered, &mut transferred.received);
        tokio::try_join!(out, back).map(drop)
    };
    if result.is_err() {
        send.send_reset(Reason::CANCEL);
        socket::reset(socket);
    }
    (transferred, result)
}

async fn relay(
    read: &mut ReadHalf<'_>,
    write: &mut WriteHalf<'_>,
    count: &mut u64,
) -> Result<(), CopyError> {
    let mut buffer = Buffer::default();
    loop {
        let data = std::future::poll_fn(|context| buffer.poll_read(read, context)).await?;
        if data.is_empty() {
            write.shutdown().await?;
            return Ok(());
        }
        write.write_all(&data).await?;
        *count += data.len() as u64;
    }
}

async fn to_stream(
    read: &mut ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    unanswered: &AtomicU32,
    count: &mut u64,
) -> Result<(), CopyError> {
    let mut buffer = Buffer::default();
    loop {
        let next = std::future::poll_fn(|context| {
            if let Poll::Ready(data) = buffer.poll_read(read, context) {
                return Poll::Ready(data.map_err(CopyError::from).map(Some));
            }
            // While there is nothing to send, only this tells that nobody is there to take it.
            match ready!(send.poll_reset(context)) {
                Ok(Reason::NO_ERROR) => Poll::Ready(Ok(None)),
                Ok(reason) => Poll::Ready(Err(CopyError::Reset(reason))),
                Err(error) => Poll::Ready(Err(error.into())),
            }
        });
        // The peer has all that it wants.
        let Some(data) = next.await? else {
            return Ok(());
        };
        if data.is_empty() {
            send.send_data(data, true)?;
            return Ok(());
        }
        *count += data.len() as u64;
        let small = data.len() < SMALL_FRAME;
        send_all(send, data).await?;
        if small && unanswered.fetch_add(1, Ordering::Relaxed) >= SMALL_FRAMES {
            // A peer must hold every frame that is not read yet, and gives up when they are too
            // many. One that answers reads.
            tokio::time::sleep(GATHER).await;
        }
    }
}

async fn send_all(send: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), CopyError> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let mut capacity = send.capacity();
        if capacity == 0 {
            let more = std::future::poll_fn(|context| send.poll_capacity(context));
            capacity = more.await.ok_or(CopyError::Closed)??;
        }
        if capacity > 0 {
            send.send_data(data.split_to(capacity.min(data.len())), false)?;
        }
    }
    Ok(())
}

async fn from_stream(
    mut receive: RecvStream,
    write: &mut WriteHalf<'_>,
    unanswered: &AtomicU32,
    count: &mut u64,
) -> Result<(), CopyError> {
    let mut chunks = Chunks::default();
    loop {
        let ended = std::future::poll_fn(|context| chunks.poll_fill(&mut receive, context)).await?;
        unanswered.store(0, Ordering::Relaxed);
        let length = chunks.length();
        while !chunks.is_empty() {
            let written = write.write_vectored(&chunks.slices()).await?;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            chunks.advance(written);
        }
        *count += length as u64;
        // Only now: the sender is to wait while the socket does.
        receive.flow_control().release_capacity(length)?;
        if ended {
            write.shutdown().await?;
            return Ok(());
        }
    }
}

/// Where reads go to. It holds memory only while bytes keep coming.
struct Buffer {
    spare: BytesMut,
    size: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        Self {
            spare: BytesMut::new(),
            size: BUFFER_SMALL,
        }
    }
}

impl Buffer {
    /// What has come; nothing at the end.
    fn poll_read(
        &mut self,
        read: &mut ReadHalf<'_>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<Bytes>> {
        let waiting = read.as_ref().poll_read_ready(context)?.is_pending();
        if !waiting {
            if self.spare.capacity() < self.size.min(BUFFER_SMALL) {
                self.spare.reserve(self.size);
            }
            let room = self.spare.capacity();
            if let Poll::Ready(got) = poll_read_buf(Pin::new(read), context, &mut self.spare)? {
                if got == room {
                    self.size = (self.size * 4).min(BUFFER_LARGE);
                }
                return Poll::Ready(Ok(self.spare.split().freeze()));
            }
        }
        self.spare = BytesMut::new();
        Poll::Pending
    }
}
