//! An error as the text of a message: these cross processes, where its type cannot.

use std::error::Error;

/// An error and its causes on one line, separated by colons.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::chain;
    use crate::frame::{Channel, Decoder, encode};

    #[test]
    fn every_cause_is_named_once() {
        let mut decoder = Decoder::new();
        decoder.push(&encode(Channel::Message, b"nonsense").unwrap());
        let error = decoder
            .next_frame()
            .unwrap()
            .unwrap()
            .message::<u32>()
            .unwrap_err();
        assert_eq!(
            chain(&error),
            "a message that is not understood: expected ident at line 1 column 2"
        );
    }
}
