//! What fuzz targets call: whatever reads what `iptables-save` prints.

use std::hint::black_box;

use crate::family::Family;
use crate::input::{IptablesBackend, Marks};
use crate::kernel::iptables;
use crate::names::Names;

use super::saved::Saved;
use super::{backend, marks, source_check};

/// Reads our chains and other people's rules.
pub fn iptables_save(text: &str) {
    let names = Names::default();
    for chain in iptables::parse(text, &names).into_values() {
        assert!(chain.jumps.is_sorted());
    }
    let printed = (IptablesBackend::Nft, Family::V4);
    let saved = [Saved::new(printed, None, text.to_owned(), names)];
    let used = backend::usage(IptablesBackend::Nft, &saved);
    black_box(backend::choose(None, used, backend::Usage::default()));
    drop(marks::used(&[], &saved, &Marks::default()));
    drop(source_check::dropping(&saved, "vproxy"));
}
