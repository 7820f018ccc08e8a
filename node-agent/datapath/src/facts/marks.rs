//! Who else uses the bits of our marks. Pure.

use super::obstacle::Obstacle;
use super::saved::{Rule, Saved};
use crate::input::Marks;

/// Uses of our bits by rules of `ip rule`, given as masks, and of iptables.
pub(super) fn used(rule_marks: &[u32], saved: &[Saved], marks: &Marks) -> Vec<Obstacle> {
    let of_slots = [marks.proxied, marks.return_]
        .into_iter()
        .flat_map(|marks| [marks.first, marks.second]);
    let ours = [marks.outbound, marks.skip, marks.own]
        .into_iter()
        .chain(of_slots)
        .fold(0, |bits, mark| bits | mark.mask());
    let routing = rule_marks
        .iter()
        .map(|mask| mask & ours)
        .filter(|bits| *bits != 0)
        .map(Obstacle::RuleMark);
    let chains = saved
        .iter()
        .flat_map(Saved::foreign_rules)
        .filter_map(|rule| {
            let bits = bits(rule) & ours;
            (bits != 0).then(|| Obstacle::ChainMark {
                bits,
                rule: rule.text.to_owned(),
            })
        });
    routing.chain(chains).collect()
}

/// The bits of the packet mark that a rule compares or writes.
fn bits(rule: Rule<'_>) -> u32 {
    // Most rules of thousands are about other things.
    if !rule.text.contains("mark") {
        return 0;
    }
    let of_connection = rule.text.contains("-m connmark");
    let writes = rule.target() == Some("MARK");
    let mut bits = 0;
    let words = rule.words();
    for (name, value) in words.clone().zip(words.skip(1)) {
        match name {
            "--mark" if !of_connection => bits |= compared(value),
            "--set-xmark" | "--set-mark" if writes => bits |= written(value),
            _ => {}
        }
    }
    bits
}

/// The bits that `value/mask` compares; all without a mask.
fn compared(value: &str) -> u32 {
    value
        .split_once('/')
        .map_or(u32::MAX, |(_, mask)| number(mask))
}

/// The bits that `value/mask` writes: those of the mask are cleared, those of the value turned.
fn written(value: &str) -> u32 {
    value
        .split_once('/')
        .map_or(u32::MAX, |(value, mask)| number(value) | number(mask))
}

/// What cannot be read might be any bit.
fn number(text: &str) -> u32 {
    u32::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits_of(text: &str) -> u32 {
        bits(Rule {
            table: "mangle",
            chain: "X",
            text,
        })
    }

    #[test]
    fn a_rule_uses_the_bits_of_its_mask() {
        assert_eq!(
            bits_of("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000"),
            0x4000
        );
        assert_eq!(bits_of("-A X -m mark --mark 0x100/0x300 -j DROP"), 0x300);
        assert_eq!(bits_of("-A X -m connmark --mark 0x100/0x300 -j DROP"), 0);
        assert_eq!(bits_of("-A X -j RETURN"), 0);
    }

    #[test]
    fn a_rule_that_turns_bits_uses_them() {
        // kube-proxy takes its mark away with it.
        assert_eq!(
            bits_of("-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0"),
            0x4000
        );
    }

    #[test]
    fn a_rule_without_a_mask_uses_every_bit() {
        assert_eq!(bits_of("-A X -m mark --mark 0x1 -j DROP"), u32::MAX);
    }
}
