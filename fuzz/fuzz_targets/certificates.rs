#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    hbone::fuzzing::certificates(bytes);
    controller::fuzzing::ca(bytes);
});
