//! What `start` shows on a terminal while it waits. Elsewhere it is quiet.

use crate::error::say;
use indicatif::{ProgressBar, ProgressStyle};
use lighter_protocol::supervisor::{Origin, Phase, Status};
use std::io::IsTerminal;
use std::time::Duration;

/// A spinner with the phase of the start, on standard error.
#[derive(Debug)]
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// A spinner if standard error is a terminal and `wanted`.
    pub fn new(wanted: bool) -> Self {
        let visible = wanted && std::io::stderr().is_terminal();
        Self(visible.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        }))
    }

    /// Shows how far a start is.
    pub fn show(&self, status: &Status) {
        let Some(bar) = &self.0 else { return };
        let what = match status.phase {
            Phase::StandingBy => "suspended".into(),
            Phase::Starting | Phase::Booting | Phase::EngineStarting if status.origin != Origin::Boot => {
                match &status.origin {
                    Origin::Template(name) => format!("starting from template {name}"),
                    _ => "going on".into(),
                }
            }
            Phase::Starting => "building the machine".into(),
            Phase::Booting => "booting Linux".into(),
            Phase::EngineStarting => match status.steps.last() {
                Some(step) => format!("starting the engine, {} done", step.name),
                None => "starting the engine".into(),
            },
            Phase::Ready => "waiting for the engine's answer".into(),
            Phase::Stopping => "stopping".into(),
            Phase::Ended => "ended".into(),
        };
        bar.set_message(format!("{}: {what}", status.name));
    }

    /// Whether somebody looks at it.
    pub fn is_visible(&self) -> bool {
        self.0.is_some()
    }

    /// Shows what the wait is for, in words.
    pub fn say(&self, text: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(text.to_owned());
        }
    }

    /// Prints a line that stays.
    pub fn note(&self, text: &str) {
        let note = || say(format_args!("lighter: {text}"));
        match &self.0 {
            Some(bar) => bar.suspend(note),
            None => note(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
