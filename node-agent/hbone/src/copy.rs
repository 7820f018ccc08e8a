//! Bytes both ways until both directions have ended. A half that ended stays half-closed.

use std::io;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::socket;

/// Size of a read at first; most connections are small.
const BUFFER_SMALL: usize = 4 * 1024;
/// Size of a read once a connection turned out to be bulky.
const BUFFER_LARGE: usize = 256 * 1024;

/// How many bytes went each way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// From the one who connected.
    pub sent: u64,
    /// To the one who connected.
    pub received: u64,
}

/// A connection that ended before both sides were done.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A socket failed.
    #[error("socket: {0}")]
    Socket(#[from] io::Error),
    /// A tunnel's stream failed.
    #[error("tunnel: {0}")]
    Tunnel(#[from] h2::Error),
    /// The tunnel's stream was closed by the peer.
    #[error("the peer closed the tunnel's stream")]
    Closed,
}

/// Joins two sockets: `client` connected to us, `server` we connected to.
pub async fn sockets(client: TcpStream, server: TcpStream) -> (Transferred, Result<(), CopyError>) {
    let (mut client, mut server) = (client, server);
    let (small, large) = (64 * 1024, 64 * 1024);
    match tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, small, large).await {
        Ok((sent, received)) => (Transferred { sent, received }, Ok(())),
        Err(error) => {
            socket::reset(client);
            socket::reset(server);
            (Transferred::default(), Err(error.into()))
        }
    }
}

/// Joins a socket and a stream of a tunnel. `sent` counts what was read from the socket.
pub async fn tunnel(
    socket: TcpStream,
    mut send: SendStream<Bytes>,
    receive: RecvStream,
) -> (Transferred, Result<(), CopyError>) {
    let (mut read, mut write) = socket.into_split();
    let mut transferred = Transferred::default();
    let result = {
        let out = to_stream(&mut read, &mut send, &mut transferred.sent);
        let back = from_stream(receive, &mut write, &mut transferred.received);
        tokio::try_join!(out, back).map(drop)
    };
    if result.is_err() {
        send.send_reset(Reason::CANCEL);
        if let Ok(socket) = read.reunite(write) {
            socket::reset(socket);
        }
    }
    (transferred, result)
}

async fn to_stream(
    read: &mut OwnedReadHalf,
    send: &mut SendStream<Bytes>,
    count: &mut u64,
) -> Result<(), CopyError> {
    let mut size = BUFFER_SMALL;
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(size);
        let got = read.read_buf(&mut buffer).await?;
        if got == 0 {
            send.send_data(Bytes::new(), true)?;
            return Ok(());
        }
        *count += got as u64;
        if got == size && size < BUFFER_LARGE {
            size *= 4;
        }
        send_all(send, buffer.split().freeze()).await?;
    }
}

async fn send_all(send: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), CopyError> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let capacity = std::future::poll_fn(|context| send.poll_capacity(context));
        let capacity = capacity.await.ok_or(CopyError::Closed)??;
        if capacity > 0 {
            send.send_data(data.split_to(capacity.min(data.len())), false)?;
        }
    }
    Ok(())
}

async fn from_stream(
    mut receive: RecvStream,
    write: &mut OwnedWriteHalf,
    count: &mut u64,
) -> Result<(), CopyError> {
    while let Some(data) = receive.data().await {
        let data = data?;
        write.write_all(&data).await?;
        *count += data.len() as u64;
        receive.flow_control().release_capacity(data.len())?;
    }
    write.shutdown().await?;
    Ok(())
}
