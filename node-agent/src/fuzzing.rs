//! What fuzz targets call: whatever reads bytes of strangers.

use crate::session::frame;

/// Reads a proxy's frame: a length and a message.
pub fn proxy_message(bytes: &[u8]) {
    let Some((header, message)) = bytes.split_first_chunk() else {
        return;
    };
    if frame::announced(*header).is_ok_and(|length| length <= message.len()) {
        drop(frame::decode(message));
    }
}
