//! The guest's side of `lighter bench api`: run as a command, this program makes the same requests to dockerd's own
//! socket as the launcher makes to the host's ([`lighter_measure`]).

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use lighter_measure::requests::{self, measure};
use lighter_protocol::causes::chain;

use crate::docker_port::ENGINE_SOCKET;

/// Why there are no samples.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The launcher is of another version.
    #[error("the plan of the measurement is not understood")]
    Plan(#[source] serde_json::Error),
    /// A request failed.
    #[error("cannot measure the engine on {ENGINE_SOCKET}")]
    Measure(#[source] requests::Error),
    /// They cannot be told.
    #[error("cannot write the samples")]
    Write(#[source] io::Error),
}

/// Measures by `plan` (JSON) and prints the samples.
pub fn main(plan: &str) -> ExitCode {
    match run(plan, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(plan: &str, out: &mut impl Write) -> Result<(), Error> {
    let plan = serde_json::from_str(plan).map_err(Error::Plan)?;
    let samples = measure(Path::new(ENGINE_SOCKET), &plan).map_err(Error::Measure)?;
    let json = serde_json::to_vec(&samples).map_err(|error| Error::Write(error.into()))?;
    out.write_all(&json).map_err(Error::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_of_another_version_is_refused_before_anything_is_measured() {
        let mut out = vec![];
        let error = run(r#"{"requests":1}"#, &mut out).unwrap_err();
        assert!(matches!(error, Error::Plan(_)), "{error}");
        assert!(out.is_empty());
    }
}
