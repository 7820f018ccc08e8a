#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    datapath::facts::fuzzing::iptables_save(text);
});
