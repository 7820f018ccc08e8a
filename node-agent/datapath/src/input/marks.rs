//! Packet marks: a value with its mask, and which of them go together.

use std::fmt;
use std::str::FromStr;

use crate::slot::PerSlot;

/// Packet marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Host: send to the proxy by the outbound tunnel.
    pub outbound: Mark,
    /// Host: route by the main table.
    pub skip: Mark,
    /// Host: dialled by the proxy of a slot from a pod's address; saved in conntrack.
    pub proxied: PerSlot<Mark>,
    /// Host: the proxy's own traffic.
    pub own: Mark,
    /// Host: answer to what the proxy of a slot carries.
    pub return_: PerSlot<Mark>,
    /// Proxy: deliver locally (TPROXY).
    pub tproxy: Mark,
    /// Proxy: deliver locally (answers to transparent sockets).
    pub proxy_return: Mark,
}

/// Marks that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarksError {
    /// Packets that are to go by the main table would not.
    #[error("{name} {mark} must contain skip {skip}: what carries it is to go by the main table")]
    LacksSkip {
        /// Name of the mark.
        name: &'static str,
        /// The mark.
        mark: Mark,
        /// The skip mark.
        skip: Mark,
    },
    /// Two marks cannot be told apart.
    #[error("{name} {mark} is also read as {other_name} {other}: give them bits of their own")]
    Ambiguous {
        /// Name of the one.
        name: &'static str,
        /// The one.
        mark: Mark,
        /// Name of the other.
        other_name: &'static str,
        /// The other.
        other: Mark,
    },
}

/// Those of an AmbientNode that names none.
impl Default for Marks {
    fn default() -> Self {
        let mark = |value, mask| Mark { value, mask };
        Self {
            outbound: mark(0x100, 0x100),
            skip: mark(0x200, 0x200),
            proxied: PerSlot {
                first: mark(0x210, 0x210),
                second: mark(0x208, 0x208),
            },
            own: mark(0x220, 0x220),
            return_: PerSlot {
                first: mark(0x40, 0x40),
                second: mark(0x80, 0x80),
            },
            tproxy: mark(0x400, 0xfff),
            proxy_return: mark(0x4d3, 0xfff),
        }
    }
}

impl Marks {
    /// Whether the rules can tell the marks apart.
    ///
    /// # Errors
    /// If not, naming the marks as the AmbientNode does.
    pub fn check(&self) -> Result<(), MarksError> {
        let skip = self.skip;
        let (proxied, return_) = (self.proxied, self.return_);
        for (name, mark) in [
            ("proxied", proxied.first),
            ("proxiedSecond", proxied.second),
            ("own", self.own),
        ] {
            if !mark.matches(skip) {
                return Err(MarksError::LacksSkip { name, mark, skip });
            }
        }
        // Each of these sends a packet somewhere; `proxied` also marks a whole connection.
        let read = [
            ("outbound", self.outbound),
            ("return", return_.first),
            ("returnSecond", return_.second),
            ("proxied", proxied.first),
            ("proxiedSecond", proxied.second),
        ];
        let all = read.into_iter().chain([("skip", skip), ("own", self.own)]);
        for (other_name, other) in read {
            for (name, mark) in all.clone() {
                if name != other_name && mark.matches(other) {
                    return Err(MarksError::Ambiguous {
                        name,
                        mark,
                        other_name,
                        other,
                    });
                }
            }
        }
        Ok(())
    }
}

/// A packet mark: a value and the bits it may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark {
    value: u32,
    mask: u32,
}

/// A mark that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarkError {
    /// Not `value/mask`.
    #[error("mark {0:?} has no mask: write value/mask, for example 0x100/0x100")]
    Form(String),
    /// Not a number of 32 bits.
    #[error(
        "mark {0:?} is not made of hexadecimal numbers: write value/mask, for example 0x100/0x100"
    )]
    Number(String),
    /// The value has bits that the mask lacks, or the mask is zero.
    #[error(
        "mark {0:?} has bits outside of its mask, or no bits: its value must be within its mask"
    )]
    OutsideMask(String),
}

impl Mark {
    /// # Errors
    /// If the value is zero or has bits outside of the mask.
    pub fn new(value: u32, mask: u32) -> Result<Self, MarkError> {
        if value == 0 || value & !mask != 0 {
            return Err(MarkError::OutsideMask(format!("{value:#x}/{mask:#x}")));
        }
        Ok(Self { value, mask })
    }

    /// The bits that are set.
    #[must_use]
    pub fn value(self) -> u32 {
        self.value
    }

    /// Whether a packet that carries this mark meets a rule about `other`.
    #[must_use]
    pub fn matches(self, other: Self) -> bool {
        self.value & other.mask == other.value
    }

    /// The bits that are compared and written.
    #[must_use]
    pub fn mask(self) -> u32 {
        self.mask
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

impl FromStr for Mark {
    type Err = MarkError;

    fn from_str(text: &str) -> Result<Self, MarkError> {
        let (value, mask) = text
            .split_once('/')
            .ok_or_else(|| MarkError::Form(text.to_owned()))?;
        let number = |part: &str| {
            part.strip_prefix("0x")
                .and_then(|digits| u32::from_str_radix(digits, 16).ok())
                .ok_or_else(|| MarkError::Number(text.to_owned()))
        };
        Self::new(number(value)?, number(mask)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mark_without_a_mask_is_refused() {
        assert_eq!(
            "0x100".parse::<Mark>(),
            Err(MarkError::Form("0x100".to_owned()))
        );
    }

    #[test]
    fn a_mark_outside_of_its_mask_is_refused() {
        assert!(matches!(
            "0x300/0x100".parse::<Mark>(),
            Err(MarkError::OutsideMask(_))
        ));
        assert!(matches!(
            "0x0/0x100".parse::<Mark>(),
            Err(MarkError::OutsideMask(_))
        ));
    }

    #[test]
    fn a_mark_of_other_numbers_is_refused() {
        assert!(matches!(
            "256/0x100".parse::<Mark>(),
            Err(MarkError::Number(_))
        ));
        assert!(matches!(
            "0x1ffffffff/0x100".parse::<Mark>(),
            Err(MarkError::Number(_))
        ));
    }

    #[test]
    fn marks_that_rules_cannot_tell_apart_are_refused() {
        assert_eq!(Marks::default().check(), Ok(()));
        let ambiguous = Marks {
            own: "0x320/0x320".parse().unwrap(),
            ..Marks::default()
        };
        assert!(matches!(
            ambiguous.check(),
            Err(MarksError::Ambiguous {
                name: "own",
                other_name: "outbound",
                ..
            })
        ));
        let mut without_skip = Marks::default();
        without_skip.proxied.first = "0x10/0x10".parse().unwrap();
        assert!(matches!(
            without_skip.check(),
            Err(MarksError::LacksSkip {
                name: "proxied",
                ..
            })
        ));
    }

    proptest! {
        #[test]
        fn a_printed_mark_parses_back(mask in 1u32.., bits in any::<u32>()) {
            let value = bits & mask;
            prop_assume!(value != 0);
            let mark = Mark::new(value, mask).unwrap();
            prop_assert_eq!(mark.to_string().parse::<Mark>(), Ok(mark));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<Mark>();
        }
    }
}
