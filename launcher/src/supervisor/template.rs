//! The template that a VM leaves behind when it boots for the first time: saved when its engine is ready, and before that serves
//! anybody, so that nothing of anybody is in it. The VM stands still only as for a snapshot; its memory is written while it goes
//! on. A VM without is as good: what fails is only told.

use super::snapshot::{MachineFacts, Snapshots};
use super::state::State;
use crate::error::{Context, Error, Result, say};
use crate::name::Name;
use crate::paths::Paths;
use crate::snapshots::create::{Keep, describe};
use crate::templates::key::{Key, Surroundings};
use crate::templates::store::Making;
use crate::vm::Vm;
use lighter_protocol::agent::{EngineSettings, EngineState};
use lighter_protocol::supervisor::{Phase, Taken, TemplateState};

/// One that is to be made.
#[derive(Debug)]
pub struct Template {
    paths: Paths,
    vm: Vm,
    key: Key,
    snapshots: Snapshots,
    state: State,
}

impl Template {
    /// The template of `vm`, which is about to boot on `machine`: its engine serves nobody before [`Template::make`] lets
    /// it.
    pub fn of(
        paths: &Paths,
        vm: &Vm,
        machine: &MachineFacts,
        engine: &EngineSettings,
        snapshots: &Snapshots,
        state: &State,
    ) -> Option<Self> {
        let surroundings = Surroundings::new(
            machine.booted_from.clone(),
            machine.network,
            machine.mounts.clone(),
            engine.clone(),
        );
        let key = match surroundings.and_then(|surroundings| Key::of(&vm.settings, &surroundings)) {
            Ok(key) => key,
            Err(error) => {
                failed(state, &error);
                return None;
            }
        };
        state.template(Some(TemplateState::Awaited));
        Some(Self {
            paths: paths.clone(),
            vm: vm.clone(),
            key,
            snapshots: snapshots.clone(),
            state: state.clone(),
        })
    }

    /// Makes it when the engine is ready, unless it is there by then.
    pub async fn make(self) {
        let mut watch = self.state.watch();
        let ready = watch
            .wait_for(|status| status.engine == Some(EngineState::Ready) || status.phase >= Phase::Stopping);
        let ready = ready.await.is_ok_and(|status| status.phase < Phase::Stopping);
        let made = match ready {
            true => self.save().await,
            false => Ok(false),
        };
        match made {
            Ok(true) => self.state.template(Some(TemplateState::Made)),
            Ok(false) => self.state.template(None),
            // What was not whole is removed.
            Err(_) if self.state.phase() >= Phase::Stopping => self.state.template(None),
            Err(error) => failed(&self.state, &error),
        }
    }

    async fn save(&self) -> Result<bool> {
        // What others gave up may be large.
        let making = tokio::task::block_in_place(|| Making::begin(&self.paths, &self.key))?;
        let Some(making) = making else {
            return Ok(false);
        };
        let folder = making.folder.clone();
        let goes_on = || self.state.template(Some(TemplateState::Writing));
        let began_unix_ms = crate::clock::unix_ms();
        let taken = self.snapshots.take_first(folder, &self.state, goes_on).await?;
        let paused_ms = taken.paused_ns as f64 / 1e6;
        let vm = self.vm.clone();
        let finish = move || finish(making, &vm, &taken, began_unix_ms);
        let name = tokio::task::spawn_blocking(finish)
            .await
            .context(|| "the task that finishes the template ended early".into())??;
        say(format_args!(
            "lighter: template {name} is made; the VM stood still for {paused_ms:.1} ms"
        ));
        Ok(true)
    }
}

/// Describes what was saved, and gives it its name.
fn finish(making: Making, vm: &Vm, taken: &Taken, taken_unix_ms: u64) -> Result<Name> {
    describe(
        vm,
        &making.name,
        &making.folder,
        taken,
        taken_unix_ms,
        Keep::Template,
    )?;
    Ok(making.finish()?)
}

fn failed(state: &State, error: &Error) {
    say(format_args!("lighter: no template is made: {}", error.message));
    state.trouble(
        "template",
        &format!(
            "none is made of this VM, and the next one boots, too: {}",
            error.message
        ),
    );
    state.template(Some(TemplateState::Failed));
}
