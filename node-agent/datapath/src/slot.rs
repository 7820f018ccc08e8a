//! The two places that proxies have on a node. One is taken while a proxy serves alone, both while
//! a new one takes over and the old one's connections come to their end.

use std::ops::{Index, IndexMut};

/// One of the two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// The one that the first proxy of a node takes.
    First,
    /// The one that its successor takes.
    Second,
}

impl Slot {
    /// Both, in order.
    pub const BOTH: [Self; 2] = [Self::First, Self::Second];

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// One value for each slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerSlot<T> {
    /// That of the first.
    pub first: T,
    /// That of the second.
    pub second: T,
}

impl<T> PerSlot<T> {
    /// Each slot with its value.
    pub fn iter(&self) -> impl Iterator<Item = (Slot, &T)> {
        Slot::BOTH.into_iter().map(|slot| (slot, &self[slot]))
    }

    /// The same by reference.
    pub fn as_ref(&self) -> PerSlot<&T> {
        PerSlot {
            first: &self.first,
            second: &self.second,
        }
    }

    /// The values, one by one turned into others.
    pub fn map<U>(self, mut turn: impl FnMut(T) -> U) -> PerSlot<U> {
        PerSlot {
            first: turn(self.first),
            second: turn(self.second),
        }
    }
}

impl<T> PerSlot<Option<T>> {
    /// The slots that are taken, with what is in them.
    pub fn taken(&self) -> impl Iterator<Item = (Slot, &T)> {
        self.iter()
            .filter_map(|(slot, value)| Some((slot, value.as_ref()?)))
    }
}

impl<T> Index<Slot> for PerSlot<T> {
    type Output = T;

    fn index(&self, slot: Slot) -> &T {
        match slot {
            Slot::First => &self.first,
            Slot::Second => &self.second,
        }
    }
}

impl<T> IndexMut<Slot> for PerSlot<T> {
    fn index_mut(&mut self, slot: Slot) -> &mut T {
        match slot {
            Slot::First => &mut self.first,
            Slot::Second => &mut self.second,
        }
    }
}
