//! Notes beside a snapshot which pages of its memory a VM touches until its engine answers, so that the next VM has them at hand.

use super::monitor;
use super::state::State;
use crate::error::{Context, Result, say};
use crate::snapshots::base::{Base, WORKING_SET};
use lighter_protocol::monitor::Request;
use lighter_protocol::supervisor::Phase;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The engine's first client has its answer then; what is touched meanwhile is of use, too.
const FIRST_ANSWERS: Duration = Duration::from_secs(1);

/// Whether that is to be noted of a VM that goes on from `base`.
pub fn is_wanted(base: &Base) -> bool {
    // What a fork goes on from is removed when it runs.
    let name = base.folder.file_name().unwrap_or_default();
    !name.as_encoded_bytes().starts_with(b".") && base.working_set().is_none()
}

/// Notes it for the snapshot in `folder`, when the engine is ready.
pub async fn note_when_ready(folder: PathBuf, monitor: PathBuf, state: State) {
    let mut watch = state.watch();
    let ready = watch.wait_for(|status| status.phase >= Phase::Ready).await;
    if !ready.is_ok_and(|status| status.phase == Phase::Ready) {
        return;
    }
    tokio::time::sleep(FIRST_ANSWERS).await;
    let noted = tokio::task::spawn_blocking(move || note(&folder, &monitor));
    // A snapshot that was removed meanwhile needs none, and others do without.
    if let Ok(Err(error)) = noted.await {
        say(format_args!(
            "lighter: no working set was noted: {}",
            error.message
        ));
    }
}

fn note(folder: &Path, monitor: &Path) -> Result<()> {
    let failed = || format!("cannot write {}", folder.join(WORKING_SET).display());
    let file = tempfile::NamedTempFile::new_in(folder).context(failed)?;
    monitor::ask(monitor, &Request::WorkingSet, &[file.as_file().as_fd()])?;
    let named = file.persist(folder.join(WORKING_SET));
    named.map(drop).map_err(|error| error.error).context(failed)
}
