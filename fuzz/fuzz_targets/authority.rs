#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    hbone::fuzzing::authority(text);
});
