#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    proxy::fuzzing::agent_message(bytes);
    node_agent::fuzzing::proxy_message(bytes);
});
