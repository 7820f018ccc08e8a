//! What is committed is what the types say.

#[test]
fn the_committed_yaml_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/yaml/ambientnodes.yaml");
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        committed,
        crds::yaml().unwrap(),
        "run: cargo run -p crds --bin crdgen > crds/yaml/ambientnodes.yaml"
    );
}
