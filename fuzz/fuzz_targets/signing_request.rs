#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    controller::fuzzing::signing_request(text);
});
