//! `docs/conditions.md` tells of every reason that a status may have.

const REASONS: &str = include_str!("../src/reasons.rs");
const CONDITIONS: &str = include_str!("../../docs/conditions.md");

#[test]
fn every_reason_is_documented() {
    let reasons: Vec<&str> = REASONS
        .lines()
        .filter(|line| line.starts_with("pub const "))
        .filter_map(|line| line.split('"').nth(1))
        .collect();
    assert!(reasons.len() > 30, "{reasons:?}");
    let missing: Vec<&str> = reasons
        .into_iter()
        .filter(|reason| !CONDITIONS.contains(&format!("`{reason}`")))
        .collect();
    assert!(missing.is_empty(), "docs/conditions.md lacks {missing:?}");
}
