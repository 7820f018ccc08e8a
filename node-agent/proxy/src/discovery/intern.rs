//! Interning: what many workloads have in common is kept once. A cluster has far fewer nodes, service accounts and
//! sets of Services than pods.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use hbone::directory::ServedPorts;
use hbone::identity::SpiffeId;

/// Values that workloads share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    services: HashSet<Arc<ServedPorts>>,
    identities: HashSet<SpiffeId>,
    /// How many there were after the last cleaning.
    cleaned: usize,
}

impl Interner {
    /// Forgets what nobody has any more, if there is much that is new.
    pub(crate) fn clean(&mut self) {
        if self.len() < 2 * self.cleaned + 1024 {
            return;
        }
        // Identities hold texts of their own; whoever still has one is not known.
        self.identities.clear();
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.services
            .retain(|services| Arc::strong_count(services) > 1);
        self.cleaned = self.len();
    }

    fn len(&self) -> usize {
        self.texts.len() + self.services.len() + self.identities.len()
    }

    pub(crate) fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.texts.insert(new.clone());
        new
    }

    pub(crate) fn services(&mut self, services: ServedPorts) -> Arc<ServedPorts> {
        known_or_new(&mut self.services, Arc::new(services))
    }

    pub(crate) fn identity(&mut self, identity: SpiffeId) -> SpiffeId {
        known_or_new(&mut self.identities, identity)
    }
}

fn known_or_new<T: Clone + Eq + Hash>(all: &mut HashSet<T>, new: T) -> T {
    if let Some(known) = all.get(&new) {
        return known.clone();
    }
    all.insert(new.clone());
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one() {
        let mut interner = Interner::default();
        let (one, two) = (interner.text("node-1"), interner.text("node-1"));
        assert!(Arc::ptr_eq(&one, &two));
        let services = || ServedPorts::from([("shop/web".into(), [(80, 8080)].into())]);
        let (one, two) = (interner.services(services()), interner.services(services()));
        assert!(Arc::ptr_eq(&one, &two));
    }

    #[test]
    fn what_nobody_has_any_more_is_forgotten() {
        let mut interner = Interner::default();
        let kept = interner.text("kept");
        for number in 0..5000 {
            interner.text(&number.to_string());
        }
        interner.clean();
        assert_eq!(interner.len(), 1);
        assert!(Arc::ptr_eq(&interner.text("kept"), &kept));
    }
}
