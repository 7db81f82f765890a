//! Arguments of `docker-proxy`.
#![no_main]

#[path = "../../guest-agent/src/proxy/arguments.rs"]
mod arguments;

use arguments::Arguments;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let words = bytes.split(|byte| *byte == b'\n');
    let words = words.map(|word| String::from_utf8_lossy(word).into_owned());
    if let Ok(arguments) = Arguments::parse(words) {
        assert!(arguments.host.port() != 0 && arguments.container.port() != 0);
        let _ = (arguments.transport, arguments.use_listen_fd);
    }
});
