//! Messages between processes, of an end that says anything.
#![no_main]

use lighter_fuzz::Input;
use lighter_protocol::frame::Decoder;
use lighter_protocol::network::GuestNetwork;
use lighter_protocol::publish::RandomPorts;
use lighter_protocol::shares::{GuestShare, find_socket};
use lighter_protocol::{agent, exec, monitor, publish, supervisor};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What is understood can be said, and is then the same.
fn message<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<T>(bytes) {
        let said = serde_json::to_vec(&message).expect("say it");
        let heard: T = serde_json::from_slice(&said).expect("hear it");
        assert_eq!(said, serde_json::to_vec(&heard).expect("say it again"));
    }
}

fn any_message(bytes: &[u8]) {
    message::<agent::AgentMessage>(bytes);
    message::<agent::SupervisorMessage>(bytes);
    message::<exec::ExecRequest>(bytes);
    message::<exec::ExecReply>(bytes);
    message::<monitor::Machine>(bytes);
    message::<monitor::Request>(bytes);
    message::<monitor::Response>(bytes);
    message::<monitor::Event>(bytes);
    message::<publish::Publish>(bytes);
    message::<publish::Reply>(bytes);
    message::<supervisor::Request>(bytes);
    message::<supervisor::Status>(bytes);
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.byte() & 3 {
        0 => any_message(input.take(usize::MAX)),
        1 => {
            let text = String::from_utf8_lossy(input.take(usize::MAX));
            let _ = GuestNetwork::find(&text);
            let _ = RandomPorts::find(&text);
            let _ = GuestShare::find_all(&text);
            let _ = find_socket(&text);
        }
        _ => {
            let mut decoder = Decoder::new();
            while !input.is_empty() {
                let piece = input.byte().into();
                decoder.push(input.take(piece));
                loop {
                    match decoder.next_frame() {
                        Ok(Some(frame)) => any_message(&frame.payload),
                        Ok(None) => break,
                        Err(_) => return,
                    }
                }
            }
        }
    }
});
