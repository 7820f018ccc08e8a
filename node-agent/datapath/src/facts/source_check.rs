//! Rules that drop what does not come from the address that its device leads to. The proxy sends from
//! its clients' addresses, so it would not get through. Calico has such a rule for every pod, and
//! leaves out the pods that it is told to. Pure.

use super::obstacle::Obstacle;
use super::saved::{Rule, Saved};

/// The first rule that would drop what the proxy sends by its device.
pub(super) fn dropping(saved: &[Saved], device: &str) -> Option<Obstacle> {
    saved.iter().find_map(|saved| {
        let rules: Vec<Rule<'_>> = saved.foreign_rules().collect();
        let drops = |(index, rule): &(usize, &Rule<'_>)| {
            if !is_check(**rule) {
                return false;
            }
            let before: Vec<Rule<'_>> = rules[..*index]
                .iter()
                .filter(|before| (before.table, before.chain) == (rule.table, rule.chain))
                .copied()
                .collect();
            meets(**rule, &before, device) && !is_exempt(&before, &rules, device)
        };
        let (_, rule) = rules.iter().enumerate().find(drops)?;
        Some(Obstacle::SourceCheck {
            device: device.to_owned(),
            rule: rule.text.to_owned(),
        })
    })
}

/// A strict check of the way back. A loose one is content with any device, and lets us through.
fn is_check(rule: Rule<'_>) -> bool {
    let has = |word: &str| rule.words().any(|found| found == word);
    rule.text.contains("rpfilter")
        && has("rpfilter")
        && has("--invert")
        && !has("--loose")
        && matches!(rule.target(), Some("DROP" | "REJECT"))
}

/// Whether packets of this device meet the rule: by its name, and by a mark that it may ask for, which
/// rules before it give by the device.
fn meets(rule: Rule<'_>, before: &[Rule<'_>], device: &str) -> bool {
    let marked = rule.value("--mark").is_none_or(|mark| {
        before.iter().any(|setter| {
            setter.target() == Some("MARK")
                && interface(*setter, device) != Interface::Another
                && setter
                    .value("--set-xmark")
                    .is_some_and(|set| gives(set, mark))
        })
    });
    marked && interface(rule, device) != Interface::Another
}

/// Whether writing `set` makes a packet match `mark`, both `value/mask`.
fn gives(set: &str, mark: &str) -> bool {
    let parse = |text: &str| {
        let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
        let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        Some((number(value)?, number(mask)?))
    };
    match (parse(set), parse(mark)) {
        (Some((set, _)), Some((wanted, mask))) => set & mask == wanted && wanted != 0,
        _ => false,
    }
}

/// Whether a rule before the check, or in a chain that one leads to, takes this device out of it.
fn is_exempt(before: &[Rule<'_>], all: &[Rule<'_>], device: &str) -> bool {
    let in_chain = |from: &Rule<'_>| {
        all.iter()
            .filter(|rule| rule.table == from.table && Some(rule.chain) == from.target())
            .any(|rule| takes_out(*rule, device))
    };
    before
        .iter()
        .any(|rule| takes_out(*rule, device) || in_chain(rule))
}

/// Accepts what comes by this device, whatever it is: prefixes of addresses are their owner's choice.
fn takes_out(rule: Rule<'_>, device: &str) -> bool {
    const NARROWER: [&str; 3] = ["-p", "-d", "--mark"];
    interface(rule, device) == Interface::This
        && rule.target() == Some("ACCEPT")
        && !rule.words().any(|word| NARROWER.contains(&word))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Interface {
    /// The rule names this device, or the start of its name.
    This,
    /// It names none.
    Any,
    /// It names another one.
    Another,
}

fn interface(rule: Rule<'_>, device: &str) -> Interface {
    let Some(pattern) = rule.value("-i") else {
        return Interface::Any;
    };
    let named = match pattern.strip_suffix('+') {
        Some(start) => device.starts_with(start),
        None => device == pattern,
    };
    let negated = rule
        .words()
        .zip(rule.words().skip(1))
        .any(|pair| pair == ("!", "-i"));
    match (named, negated) {
        (true, false) => Interface::This,
        (false, true) => Interface::Any,
        (true, true) | (false, false) => Interface::Another,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Family;
    use crate::input::IptablesBackend;
    use crate::names::Names;

    /// Calico's raw table, with what Felix puts into its chain for exempted pods.
    fn calico(exempted: &str) -> Saved {
        saved(format!(
            r#"*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:cali-PREROUTING - [0:0]
:cali-from-host-endpoint - [0:0]
:cali-rpf-skip - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A cali-PREROUTING -m comment --comment "cali:XFX5xbM8B9qR10JG" -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -i cali+ -m comment --comment "cali:EWMPb0zVROM-woQp" -j MARK --set-xmark 0x40000/0x40000
-A cali-PREROUTING -m comment --comment "cali:PWuxTAIaFCtsg5Qa" -m mark --mark 0x40000/0x40000 -j cali-rpf-skip
-A cali-PREROUTING -m comment --comment "cali:fSSbGND7dgyemWU7" -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
-A cali-PREROUTING -m comment --comment "cali:ImU0-4Rl2WoOI9Ou" -m mark --mark 0x0/0x40000 -j cali-from-host-endpoint
-A cali-PREROUTING -m comment --comment "cali:lV4V2MPoMBf0hl9T" -m mark --mark 0x10000/0x10000 -j ACCEPT
{exempted}COMMIT
"#
        ))
    }

    fn saved(text: String) -> Saved {
        Saved::new(
            (IptablesBackend::Nft, Family::V4),
            None,
            text,
            Names::default(),
        )
    }

    fn drops(saved: Saved, device: &str) -> bool {
        dropping(&[saved], device).is_some()
    }

    #[test]
    fn calico_drops_what_the_proxy_sends_unless_it_is_exempted() {
        let found = dropping(&[calico("")], "cali0123").unwrap().to_string();
        assert!(
            found.contains("allowedSourcePrefixes") && found.contains("workloadSourceSpoofing"),
            "{found}"
        );
        assert!(drops(
            calico("-A cali-rpf-skip -i cali4567 -j ACCEPT\n"),
            "cali0123"
        ));
        assert!(!drops(
            calico("-A cali-rpf-skip -i cali0123 -j ACCEPT\n"),
            "cali0123"
        ));
        assert!(!drops(
            calico("-A cali-rpf-skip -s 10.0.0.0/8 -i cali0123 -j ACCEPT\n"),
            "cali0123"
        ));
        assert!(drops(
            calico("-A cali-rpf-skip -i cali0123 -p udp -j ACCEPT\n"),
            "cali0123"
        ));
    }

    #[test]
    fn devices_that_calico_does_not_mark_are_not_checked() {
        assert!(!drops(calico(""), "veth0123"));
    }

    #[test]
    fn a_check_of_every_device_is_found_and_a_loose_one_is_none() {
        let rule = |words: &str| saved(format!("*mangle\n-A PREROUTING {words}\nCOMMIT\n"));
        assert!(drops(rule("-m rpfilter --invert -j DROP"), "vethp"));
        assert!(drops(
            rule("! -i eth0 -m rpfilter --validmark --invert -j DROP"),
            "vethp"
        ));
        assert!(!drops(
            rule("-i eth0 -m rpfilter --invert -j DROP"),
            "vethp"
        ));
        assert!(!drops(
            rule("-m rpfilter --loose --invert -j DROP"),
            "vethp"
        ));
        assert!(!drops(rule("-m rpfilter -j ACCEPT"), "vethp"));
    }
}
