#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    datapath::kernel::netlink::fuzzing::route(bytes);
    datapath::kernel::netlink::fuzzing::netfilter(bytes);
    datapath::kernel::netlink::fuzzing::legacy_table(bytes);
});
