//! One daemon, supervised: started, its readiness awaited, started again when it dies, stopped when asked.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, process::ExitStatusExt},
    },
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use lighter_protocol::agent::{EngineState, LogSource};
use nix::{
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe2},
};
use tokio::{
    process::{Child, Command},
    sync::{oneshot, watch},
    time::{sleep, timeout},
};

use crate::{
    cgroup,
    daemon_log::{LastLines, follow},
    fd::AsyncFile,
    log::Log,
    notify::{Notification, Socket},
    outbox::Outbox,
    process::{PATH, describe, write_kernel_file},
    timeline,
};

/// What to run, and how.
#[derive(Clone, Debug)]
pub struct Spec {
    /// For messages.
    pub name: &'static str,
    /// Of its log lines.
    pub source: LogSource,
    /// The executable.
    pub program: &'static str,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its environment, besides what every daemon gets.
    pub environment: Vec<(String, String)>,
    /// Mount points that are read-only for it, and for it alone.
    pub cannot_write: Vec<PathBuf>,
    /// A file that it sees in the place of another, of the kernel's in `/proc`, and it alone.
    pub sees: Option<(PathBuf, PathBuf)>,
    /// Where its readiness socket is made.
    pub notify_path: PathBuf,
    /// How long it may take to stop before it is killed.
    pub stop_limit: Duration,
}

/// How one run of a daemon ended.
enum End {
    /// It was asked to.
    Stopped,
    /// It died, or could not be started.
    Died {
        reason: String,
        ready_for: Option<Duration>,
    },
}

/// Runs the daemon until `stop` turns true, telling each change of its state to `report`.
pub async fn supervise(
    spec: Spec,
    log: Log,
    outbox: Outbox,
    mut stop: watch::Receiver<bool>,
    report: impl Fn(EngineState),
) {
    let last_lines = LastLines::default();
    let mut backoff = Backoff::default();
    let mut is_first = true;
    loop {
        report(EngineState::Starting);
        let End::Died { reason, ready_for } =
            run(&spec, &log, &outbox, &last_lines, &mut stop, is_first, &report).await
        else {
            break;
        };
        is_first = false;
        let retry = backoff.after_death(ready_for);
        let retry_in_ms = retry.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
        let last_lines = last_lines.get();
        let last = last_lines.last().map_or("it wrote nothing", String::as_str);
        let next = retry_in_ms.map_or("giving up".to_owned(), |ms| {
            format!("starting it again in {ms} ms")
        });
        log.error(format!("{reason}; {next}; its last line: {last}"));
        report(EngineState::Failed {
            reason,
            last_lines,
            retry_in_ms,
        });
        let waited = async {
            match retry {
                Some(delay) => sleep(delay).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = waited => {}
            () = stopped(&mut stop) => break,
        }
    }
    report(EngineState::Stopped);
}

/// Waits until the daemon is to stop.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that nobody is left to ask, which cannot be told from being asked.
    drop(stop.wait_for(|stop| *stop).await);
}

async fn run(
    spec: &Spec,
    log: &Log,
    outbox: &Outbox,
    last_lines: &LastLines,
    stop: &mut watch::Receiver<bool>,
    is_first: bool,
    report: &impl Fn(EngineState),
) -> End {
    let failed = |what: &str, error: io::Error| End::Died {
        reason: format!("cannot {what} {}: {error}", spec.name),
        ready_for: None,
    };
    let began_ns = timeline::now_ns();
    let killed_for_memory = cgroup::daemons_killed_for_memory();
    let socket = match Socket::bind(&spec.notify_path) {
        Ok(socket) => socket,
        Err(error) => return failed("make the readiness socket of", error),
    };
    let (mut child, pipe) = match spawn(spec) {
        Ok(spawned) => spawned,
        Err(error) => return failed(&format!("start {} as", spec.program), error),
    };
    let (exited, exited_receiver) = oneshot::channel();
    let (drained, drained_receiver) = oneshot::channel();
    tokio::spawn(follow(
        pipe,
        spec.source,
        outbox.clone(),
        last_lines.clone(),
        exited_receiver,
        drained,
    ));
    let mut ready_since: Option<Instant> = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            notifications = socket.next() => match notifications {
                Ok(notifications) => for notification in notifications {
                    match notification {
                        Notification::Ready if ready_since.is_none() => {
                            ready_since = Some(Instant::now());
                            if is_first {
                                timeline::report(outbox, spec.name, began_ns, timeline::now_ns());
                            }
                            log.info(format!("{} is ready", spec.name));
                            report(EngineState::Ready);
                        }
                        Notification::Status(status) => log.info(format!("{}: {status}", spec.name)),
                        Notification::Ready | Notification::Stopping => {}
                    }
                },
                Err(error) => return failed("receive the readiness of", error),
            },
            () = stopped(stop) => {
                end(spec, log, &mut child).await;
                return End::Stopped;
            }
        }
    };
    // The reader ends by itself only after this; both ends of these channels live until then.
    let _ = exited.send(());
    drop(drained_receiver.await);
    let reason = match status {
        Ok(status)
            if status.signal() == Some(libc::SIGKILL)
                && cgroup::daemons_killed_for_memory() > killed_for_memory =>
        {
            format!(
                "{} was killed by the guest's kernel, whose memory was full",
                spec.name
            )
        }
        Ok(status) => format!("{} {}", spec.name, describe(status)),
        Err(error) => format!("cannot wait for {}: {error}", spec.name),
    };
    End::Died {
        reason,
        ready_for: ready_since.map(|since| since.elapsed()),
    }
}

fn spawn(spec: &Spec) -> io::Result<(Child, AsyncFile)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let pipe = AsyncFile::new(reader)?;
    let mut command = Command::new(spec.program);
    command
        .args(&spec.arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("TMPDIR", "/run/lighter")
        .env("NOTIFY_SOCKET", &spec.notify_path)
        .envs(spec.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(OwnedFd::try_clone(&writer)?)
        .stderr(writer);
    let text = |path: &PathBuf| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
    let cannot_write: Vec<CString> = spec.cannot_write.iter().map(text).collect::<Result<_, _>>()?;
    let sees = match &spec.sees {
        Some((file, place)) => Some([text(file)?, text(place)?]),
        None => None,
    };
    // SAFETY: the closure only makes system calls that are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if !cannot_write.is_empty() || sees.is_some() {
                // Mounts are shared with everybody all the same; whether they can be written is each one's own.
                unshare(CloneFlags::CLONE_NEWNS)?;
            }
            for path in &cannot_write {
                let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
                mount(
                    None::<&CStr>,
                    path.as_c_str(),
                    None::<&CStr>,
                    flags,
                    None::<&CStr>,
                )?;
            }
            if let Some([file, place]) = &sees {
                let none = None::<&CStr>;
                // Otherwise everybody would see it.
                mount(none, c"/proc", none, MsFlags::MS_PRIVATE, none)?;
                mount(
                    Some(file.as_c_str()),
                    place.as_c_str(),
                    none,
                    MsFlags::MS_BIND,
                    none,
                )?;
            }
            // Neither is worth failing for: the daemon runs all the same. Outside of a guest there is no such group.
            drop(write_kernel_file(crate::cgroup::ENGINE_PROCS, b"0"));
            // As Docker's own unit file does.
            drop(write_kernel_file(c"/proc/self/oom_score_adj", b"-500"));
            Ok(())
        });
    }
    Ok((command.spawn()?, pipe))
}

/// Stops the daemon: SIGTERM, and SIGKILL when it takes too long.
async fn end(spec: &Spec, log: &Log, child: &mut Child) {
    let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) else {
        return;
    };
    if let Err(errno) = kill(Pid::from_raw(pid), Signal::SIGTERM) {
        log.error(format!("cannot stop {}: {errno}", spec.name));
    }
    if timeout(spec.stop_limit, child.wait()).await.is_err() {
        log.error(format!(
            "{} did not stop within {} s; killing it",
            spec.name,
            spec.stop_limit.as_secs()
        ));
        if let Err(error) = child.kill().await {
            log.error(format!("cannot kill {}: {error}", spec.name));
        }
    }
}

/// How long to wait before a daemon is started again.
#[derive(Debug, Default)]
struct Backoff {
    /// Deaths since it last ran well.
    deaths: u32,
    /// Deaths since it was last ready at all.
    never_ready: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(500);
    const LONGEST: Duration = Duration::from_secs(30);
    /// Running this long is running well.
    const WELL: Duration = Duration::from_secs(60);
    /// After so many starts without ever being ready the cause lasts, and the user should know it.
    const TRIES: u32 = 5;

    /// The delay after a death; `None` is giving up.
    fn after_death(&mut self, ready_for: Option<Duration>) -> Option<Duration> {
        match ready_for {
            Some(time) => {
                self.never_ready = 0;
                if time >= Self::WELL {
                    self.deaths = 0;
                }
            }
            None => self.never_ready += 1,
        }
        self.deaths += 1;
        let doubled = Self::FIRST * 2u32.pow((self.deaths - 1).min(10));
        (self.never_ready < Self::TRIES).then_some(doubled.min(Self::LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn delays_double_to_a_limit_and_start_over_after_a_good_run() {
        let mut backoff = Backoff::default();
        let short = Some(Duration::from_secs(1));
        let delays: Vec<_> = (0..8)
            .map(|_| backoff.after_death(short).unwrap().as_millis())
            .collect();
        assert_eq!(delays, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        assert_eq!(
            backoff.after_death(Some(Duration::from_secs(61))),
            Some(Backoff::FIRST)
        );
    }

    #[test]
    fn a_daemon_that_is_never_ready_is_given_up() {
        let mut backoff = Backoff::default();
        for _ in 0..4 {
            assert!(backoff.after_death(None).is_some());
        }
        assert_eq!(backoff.after_death(None), None);
    }

    type States = Arc<Mutex<Vec<EngineState>>>;

    /// Supervises a shell script until `done` holds for the states reported so far, then stops it.
    async fn supervised(script: &str, done: impl Fn(&[EngineState]) -> bool) -> Vec<EngineState> {
        let folder = tempfile::tempdir().unwrap();
        let notify_path = folder.path().join("notify");
        let spec = Spec {
            name: "testd",
            source: LogSource::Dockerd,
            program: "/bin/sh",
            arguments: vec!["-c".into(), script.into()],
            environment: vec![],
            cannot_write: vec![],
            sees: None,
            notify_path,
            stop_limit: Duration::from_secs(60),
        };
        let states = States::default();
        let (changed, mut changes) = watch::channel(());
        let (stop, stop_receiver) = watch::channel(false);
        let outbox = Outbox::new();
        let task = tokio::spawn(supervise(
            spec,
            Log::new(outbox.clone()),
            outbox,
            stop_receiver,
            {
                let states = states.clone();
                move |state| {
                    states.lock().unwrap().push(state);
                    changed.send_replace(());
                }
            },
        ));
        while !done(&states.lock().unwrap()) {
            changes.changed().await.unwrap();
        }
        stop.send(true).unwrap();
        task.await.unwrap();
        let states = states.lock().unwrap();
        states.clone()
    }

    /// Notifies as systemd-notify(1) would, with what every test machine has.
    const READY: &str = r#"python3 -c 'import os,socket; socket.socket(1,2).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])'"#;

    #[tokio::test]
    async fn a_daemon_becomes_ready_and_is_stopped_by_sigterm() {
        let states = supervised(&format!("{READY}; exec sleep 1000"), |states| {
            states.last() == Some(&EngineState::Ready)
        })
        .await;
        assert_eq!(
            states,
            [EngineState::Starting, EngineState::Ready, EngineState::Stopped]
        );
    }

    #[tokio::test]
    async fn a_daemon_that_dies_is_told_with_its_last_lines_and_started_again() {
        let states = supervised("echo starting; echo no disk >&2; exit 7", |states| {
            states.len() >= 3
        })
        .await;
        assert_eq!(
            states[1],
            EngineState::Failed {
                reason: "testd ended with status 7".into(),
                last_lines: vec!["starting".into(), "no disk".into()],
                retry_in_ms: Some(500),
            }
        );
        assert_eq!(states[2], EngineState::Starting);
        assert_eq!(states.last(), Some(&EngineState::Stopped));
    }
}
