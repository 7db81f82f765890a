//! Powering off in order: containers, the engine, everything else, then sync, unmount, power-off.
//!
//! Every wait is bounded, so that nothing stuck can hold the machine up for ever; the bounds are generous, since on a
//! slow machine a container's database may need long for its last writes.

use std::{
    convert::Infallible,
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use lighter_protocol::agent::{AgentMessage, EngineState};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        reboot::{RebootMode, reboot},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tokio::time::{sleep, timeout};

use crate::{
    disk::MOUNT_POINT,
    engine::{Engine, State},
    log::Log,
    mounts::mount_points_below,
    outbox::Outbox,
    power::Request,
};

/// For processes other than the engine's between SIGTERM and SIGKILL.
const OTHERS_LIMIT: Duration = Duration::from_secs(10);

/// For the supervisor to take the last messages.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);

/// For mounts to become free once everyone is dead: loop devices and namespaces are torn down in the background.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(20);

/// Between looks at what has no event.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Does all of it. Returns only when the kernel refuses to power off.
pub async fn perform(
    request: Request,
    engine: Option<Engine>,
    state: &State,
    log: &Log,
    outbox: &Outbox,
) -> Errno {
    log.info(format!("powering off since {}", request.reason));
    if let Some(engine) = engine {
        engine.stop(log, request.container_grace).await;
    }
    state.set(EngineState::Stopped);
    end_others(log).await;
    nix::unistd::sync();
    unmount(log).await;
    outbox.push(AgentMessage::PoweringOff);
    // Nobody may be listening; the power goes off all the same.
    drop(timeout(FLUSH_LIMIT, outbox.flushed()).await);
    let Err::<Infallible, _>(errno) = reboot(RebootMode::RB_POWER_OFF);
    errno
}

/// Ends every process but PID 1 and this one.
async fn end_others(log: &Log) {
    for (signal, limit) in [(Signal::SIGTERM, OTHERS_LIMIT), (Signal::SIGKILL, OTHERS_LIMIT)] {
        // Fails only when there is nobody.
        let _ = kill(Pid::from_raw(-1), signal);
        let deadline = Instant::now() + limit;
        loop {
            match others() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => return log.error(format!("cannot list the processes that are left: {error}")),
            }
            if Instant::now() > deadline {
                break;
            }
            sleep(LOOK_AGAIN).await;
        }
    }
    log.warn("some processes could not be killed");
}

/// The number of processes other than PID 1, this one, the kernel's own and the dead.
fn others() -> io::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok());
        if pid.is_some_and(|pid| pid != 1 && pid != std::process::id())
            // Gone in the meantime is as good.
            && fs::read_to_string(entry.path().join("stat")).is_ok_and(|stat| is_alive_in_user_space(&stat))
        {
            count += 1;
        }
    }
    Ok(count)
}

/// Reads /proc/PID/stat (proc(5)): not a zombie, and not a kernel thread (flag PF_KTHREAD).
fn is_alive_in_user_space(stat: &str) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    // The name in parentheses may hold anything.
    let Some((_, fields)) = stat.rsplit_once(") ") else {
        return false;
    };
    let mut fields = fields.split(' ');
    let state = fields.next();
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok());
    !matches!(state, Some("Z" | "X") | None) && flags.is_some_and(|flags| flags & PF_KTHREAD == 0)
}

/// Unmounts the data disk and all that lies on it; what cannot be unmounted becomes read-only, which writes it out
/// as well.
async fn unmount(log: &Log) {
    let deadline = Instant::now() + UNMOUNT_LIMIT;
    loop {
        let points = match fs::read_to_string("/proc/self/mountinfo") {
            Ok(mountinfo) => mount_points_below(&mountinfo, MOUNT_POINT),
            Err(error) => return log.error(format!("cannot list the mounts that are left: {error}")),
        };
        if points.is_empty() {
            return;
        }
        let mut failed = None;
        for point in points {
            if let Err(errno) = umount2(&point, MntFlags::empty()) {
                failed = Some((point, errno));
            }
        }
        let Some((point, errno)) = failed else { continue };
        if Instant::now() > deadline {
            log.error(format!(
                "cannot unmount {}: {errno}; making it read-only",
                point.display()
            ));
            return make_read_only(log);
        }
        sleep(LOOK_AGAIN).await;
    }
}

fn make_read_only(log: &Log) {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(errno) = mount(None::<&Path>, MOUNT_POINT, None::<&str>, flags, None::<&str>) {
        log.error(format!(
            "cannot make {MOUNT_POINT} read-only: {errno}; the next start replays its journal"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zombies_and_kernel_threads_are_not_waited_for() {
        assert!(is_alive_in_user_space("7 (a) b) (c) S 1 7 7 0 -1 4194560 100"));
        assert!(!is_alive_in_user_space("7 (sh) Z 1 7 7 0 -1 4194560 100"));
        assert!(!is_alive_in_user_space("2 (kthreadd) S 0 0 0 0 -1 2129984 0"));
        assert!(!is_alive_in_user_space("garbage"));
    }

    #[test]
    fn this_machine_has_other_processes() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        assert!(others().unwrap() >= 1);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
