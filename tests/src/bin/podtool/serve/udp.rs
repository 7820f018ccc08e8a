//! UDP: each datagram comes back, behind what the server sees of its sender.

use anyhow::Result;
use serde_json::json;
use tokio::net::UdpSocket;

use crate::seen::Seen;

/// Answers every datagram.
pub(super) async fn serve(socket: UdpSocket) -> Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        let (length, sender) = socket.recv_from(&mut buffer).await?;
        let Seen { peer, pod } = Seen::new(sender);
        let text = String::from_utf8_lossy(&buffer[..length]);
        let answer = json!({"peer": peer, "pod": pod, "echo": text}).to_string();
        // The sender may have gone; the next one must still be served.
        if let Err(error) = socket.send_to(answer.as_bytes(), sender).await {
            eprintln!("{peer}: {error}");
        }
    }
}
