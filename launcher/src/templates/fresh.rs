//! The first start of a VM: from the template of its configuration if there is one that is of use; otherwise it boots, and leaves
//! one behind.

use super::key::{Key, Surroundings};
use super::store::{self, touch};
use crate::boot::{self, Begin};
use crate::client::{Client, Update, is_running, wait_until_gone};
use crate::config::Config;
use crate::disk::DiskSource;
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::name::Name;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::snapshots::base::Base;
use crate::vm::{Settings, Vm, VmError};
use clap::Args;
use lighter_protocol::causes::chain;
use lighter_protocol::supervisor::{End, IdentityState, Phase, Status};
use std::path::Path;
use std::time::Instant;

/// Whether a VM has to do with templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Templates {
    /// It starts from one, or leaves one behind.
    Used,
    /// It boots, and that is all.
    Avoided,
}

/// What the user says of it.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct TemplateOptions {
    /// Boot a new VM even if there is a template for it, and leave none behind
    #[arg(long)]
    no_template: bool,
}

impl TemplateOptions {
    /// What holds for new VMs.
    pub fn templates(self, config: &Config) -> Templates {
        match !self.no_template && config.template.unwrap_or(true) {
            true => Templates::Used,
            false => Templates::Avoided,
        }
    }
}

/// Starts `vm`, which has never run. The caller holds `edit`, its edit lock.
///
/// # Errors
/// When it cannot be started, or the time is over.
pub fn start(
    paths: &Paths,
    vm: &Vm,
    edit: Lock,
    templates: Templates,
    deadline: Instant,
    progress: &Progress,
) -> Result<(Client, Box<Status>)> {
    if templates == Templates::Avoided {
        return boot::launch(paths, vm, edit, Begin::Boot, deadline);
    }
    let Some((name, base)) = usable(paths, vm, progress) else {
        return boot::launch(paths, vm, edit, Begin::BootForTemplate, deadline);
    };
    progress.say(&format!("{}: starting from template {name}", vm.name));
    let folder = &base.folder;
    touch(folder);
    if let Err(error) = vm.renew_disk(DiskSource::Frozen(&base.disk())) {
        // The template is whole: it is this host that lacks space, say.
        progress.note(&format!(
            "VM {} boots, since it cannot start from template {name}: {}",
            vm.name,
            chain(&error)
        ));
        vm.renew_disk(DiskSource::New)?;
        return boot::launch(paths, vm, edit, Begin::Boot, deadline);
    }
    let (client, first) = boot::launch(paths, vm, edit, Begin::From(folder), deadline)?;
    match until_it_is_itself(client, first, folder, deadline, progress)? {
        Attempt::Goes(client, status) => Ok((client, status)),
        Attempt::Failed(end) => {
            wait_until_gone(vm);
            give_up(paths, &name, &Error::failure(end.sentence()), progress);
            anew(paths, vm, deadline)
        }
    }
}

/// The template for a new VM of `settings`.
pub fn find(paths: &Paths, settings: &Settings) -> Option<Name> {
    // What is missing here is told by the boot.
    let surroundings = Surroundings::of(paths, settings).ok()?;
    let key = Key::of(settings, &surroundings).ok()?;
    store::find(paths, &key)
}

/// The template for `vm`, checked as a snapshot is. One that is of no use is removed.
fn usable(paths: &Paths, vm: &Vm, progress: &Progress) -> Option<(Name, Base)> {
    let name = find(paths, &vm.settings)?;
    let folder = store::folder(paths, &name);
    let config = Config::load(&paths.config_file).ok()?;
    let checked = Base::load(&folder).and_then(|base| {
        base.check()?;
        base.booted(paths, &config)?;
        Ok(base)
    });
    match checked {
        Ok(base) => Some((name, base)),
        Err(error) => {
            give_up(paths, &name, &Error::from(error), progress);
            None
        }
    }
}

fn give_up(paths: &Paths, name: &Name, why: &Error, progress: &Progress) {
    // Another process may have done that.
    let _ = store::remove(paths, name);
    progress.note(&format!(
        "template {name} is of no use and was removed, and the VM boots: {}",
        why.message
    ));
}

/// How a start from a template went.
enum Attempt {
    /// It is for the caller to follow.
    Goes(Client, Box<Status>),
    /// The monitor did not get along with it.
    Failed(End),
}

/// Follows a start until the guest is itself, after which the template has done its part.
fn until_it_is_itself(
    mut client: Client,
    mut status: Box<Status>,
    template: &Path,
    deadline: Instant,
    progress: &Progress,
) -> Result<Attempt> {
    loop {
        progress.show(&status);
        // Without a monitor there was something else amiss, unless another process has removed the template meanwhile.
        let template_failed = status.monitor_pid.is_some() || !template.exists();
        if let Some(end) = status.end.take_if(|end| !end.requested && template_failed) {
            client.wait_for_end(Some(deadline))?;
            return Ok(Attempt::Failed(end));
        }
        let pending = matches!(status.identity, None | Some(IdentityState::Pending));
        if !pending || status.phase >= Phase::Stopping {
            return Ok(Attempt::Goes(client, status));
        }
        match client.next(Some(deadline))? {
            Update::Status(next) => status = next,
            // The caller finds out as it would have anyway.
            Update::Closed | Update::TimedOut => return Ok(Attempt::Goes(client, status)),
        }
    }
}

/// Boots a VM whose start from a template has failed. A throw-away VM was removed when its supervisor ended.
fn anew(paths: &Paths, vm: &Vm, deadline: Instant) -> Result<(Client, Box<Status>)> {
    let edit = Lock::acquire(&vm.paths.edit_lock)?;
    match Vm::load(paths, &vm.name) {
        Err(VmError::NoSuchVm(_)) => {
            Vm::create(paths, &vm.name, vm.settings.clone(), DiskSource::New)?;
        }
        Err(error) => return Err(error.into()),
        // Somebody was quicker, and it may hold data by now.
        Ok(found) if is_running(&found) || found.last_end().is_none_or(|end| end.is_clean()) => {}
        Ok(found) => found.renew_disk(DiskSource::New)?,
    }
    boot::launch(paths, vm, edit, Begin::BootForTemplate, deadline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_used_unless_the_command_or_the_configuration_says_otherwise() {
        let config = |template| Config {
            template,
            ..Config::default()
        };
        let [said, not_said] = [true, false].map(|no_template| TemplateOptions { no_template });
        for (options, template, wanted) in [
            (not_said, None, Templates::Used),
            (not_said, Some(true), Templates::Used),
            (not_said, Some(false), Templates::Avoided),
            (said, None, Templates::Avoided),
            (said, Some(true), Templates::Avoided),
        ] {
            assert_eq!(options.templates(&config(template)), wanted);
        }
    }
}
