//! The control socket: JSON lines from the supervisor, answered one by one, until the VM is over.

use crate::events::Events;
use crate::machine::Running;
use crate::virtio::net::NetError;
use lighter_protocol::causes::chain;
use lighter_protocol::monitor::{EventKind, Request, Response, StopReason};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::Receiver;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// More clients than this at once are turned away.
const MAX_CLIENTS: usize = 32;
/// A longer request ends its connection.
const MAX_REQUEST: usize = 64 << 10;
/// A client that sends more descriptors than this, and no request that takes them, is turned away.
const MAX_DESCRIPTORS: usize = 16;

/// How soon to try again when a client could not be taken, milliseconds.
const RETRY_MS: i32 = 100;

const LISTENER: u64 = u64::MAX;
const STOPPED: u64 = u64::MAX - 1;

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    /// Those that came and were not taken by a request, in their order.
    descriptors: VecDeque<OwnedFd>,
}

/// Serves requests on `machine` until it is over; says why it is.
///
/// `stopped` is signalled after a reason was put into `reasons`.
///
/// # Errors
/// When the listener cannot be waited on.
pub fn serve(
    mut machine: Running,
    listener: &UnixListener,
    events: &Events,
    stopped: &EventFd,
    reasons: &Receiver<StopReason>,
) -> io::Result<StopReason> {
    let epoll = Epoll::new()?;
    let watch = |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
    listener.set_nonblocking(true)?;
    // Told once of each that comes: one that cannot be taken would be told of for ever.
    let arrivals = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
    epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), arrivals)?;
    watch(stopped.as_raw_fd(), STOPPED)?;
    let mut clients = BTreeMap::<u64, Client>::new();
    let mut next_token = 0;
    // How long to wait at most, when clients may be left in the listener's queue.
    let mut again_ms = None;
    let reason = 'serve: loop {
        let mut ready = [EpollEvent::default(); 16];
        let count = epoll.wait(again_ms.unwrap_or(-1), &mut ready).unwrap_or(0);
        for event in &ready[..count] {
            match event.data() {
                STOPPED => {
                    if let Ok(reason) = reasons.try_recv() {
                        break 'serve reason;
                    }
                }
                LISTENER => again_ms = Some(0),
                token => {
                    let Some(client) = clients.get_mut(&token) else {
                        continue;
                    };
                    match client.serve(&mut machine, events) {
                        Ok(Next::Serve) => {}
                        Ok(Next::Stop) => break 'serve StopReason::Requested,
                        // Gone, or broken; closing the stream takes it out of the epoll set.
                        Err(_) => drop(clients.remove(&token)),
                    }
                }
            }
        }
        if again_ms.is_none() {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                again_ms = Some(0);
                // A client that is dropped here sees the connection closed.
                if clients.len() < MAX_CLIENTS
                    && stream.set_nonblocking(true).is_ok()
                    && watch(stream.as_raw_fd(), next_token).is_ok()
                {
                    clients.insert(
                        next_token,
                        Client {
                            stream,
                            received: vec![],
                            descriptors: VecDeque::new(),
                        },
                    );
                    next_token += 1;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => again_ms = None,
            // Out of descriptors, say: others will be closed.
            Err(_) => again_ms = Some(RETRY_MS),
        }
    };
    machine.stop();
    Ok(reason)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Serve,
    Stop,
}

impl Client {
    /// Answers the complete lines that are there. An error means that the client is to be forgotten.
    fn serve(&mut self, machine: &mut Running, events: &Events) -> io::Result<Next> {
        match self.receive() {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            let (response, next) = answer(&line, &mut self.descriptors, machine, events);
            let mut text = serde_json::to_vec(&response).map_err(io::Error::other)?;
            text.push(b'\n');
            self.stream.write_all(&text)?;
            if next == Next::Stop {
                return Ok(next);
            }
        }
        if self.received.len() > MAX_REQUEST || self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(Next::Serve)
    }

    /// Takes some bytes and the descriptors that come with them; returns how many bytes.
    fn receive(&mut self) -> io::Result<usize> {
        let mut bytes = [0u8; 4096];
        let mut numbers = [-1; MAX_DESCRIPTORS];
        let mut parts = [libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        // SAFETY: one part, which is a buffer of that length.
        let received = unsafe { self.stream.recv_with_fds(&mut parts, &mut numbers) };
        let (count, descriptors) = received.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        for number in &numbers[..descriptors] {
            // SAFETY: the kernel has just made it for this message, and nobody else knows of it.
            self.descriptors
                .push_back(unsafe { OwnedFd::from_raw_fd(*number) });
        }
        self.received.extend_from_slice(&bytes[..count]);
        Ok(count)
    }
}

fn answer(
    line: &[u8],
    descriptors: &mut VecDeque<OwnedFd>,
    machine: &mut Running,
    events: &Events,
) -> (Response, Next) {
    let request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => {
            return (
                Response::Error {
                    message: format!("no such request: {error}"),
                },
                Next::Serve,
            );
        }
    };
    let response = match request {
        Request::Status => {
            let (state, cpus, memory_mib) = machine.status();
            Response::Status {
                state,
                cpus,
                memory_mib,
            }
        }
        Request::Pause => {
            machine.pause();
            events.send(EventKind::Paused);
            Response::Done
        }
        Request::Resume => {
            machine.resume();
            events.send(EventKind::Resumed);
            Response::Done
        }
        Request::Save => match take_two(descriptors) {
            Some([state, memory]) => match machine.save(state.into(), memory.into(), events) {
                Ok(()) => Response::Done,
                Err(error) => Response::Error {
                    message: format!("cannot take a snapshot: {}", chain(&error)),
                },
            },
            None => Response::Error {
                message: "two descriptors have to come with the request".into(),
            },
        },
        Request::WorkingSet => match descriptors.pop_front() {
            Some(file) => match machine.note_working_set(file.into()) {
                Ok(()) => Response::Done,
                Err(error) => Response::Error {
                    message: chain(&error),
                },
            },
            None => Response::Error {
                message: "a descriptor has to come with the request".into(),
            },
        },
        Request::AddLayer { disk, merged } => {
            let merged_file = if merged { descriptors.pop_front() } else { None };
            match descriptors.pop_front() {
                Some(layer) => match machine.add_layer(&disk, layer.into(), merged_file.map(File::from)) {
                    Ok(()) => Response::Done,
                    Err(error) => Response::Error {
                        message: format!("cannot add a layer to disk {disk}: {}", chain(&error)),
                    },
                },
                None => Response::Error {
                    message: "the descriptor of each layer has to come with the request".into(),
                },
            }
        }
        Request::Plug => match descriptors.pop_front() {
            Some(plug) => plugged(machine.plug(Some(plug))),
            None => Response::Error {
                message: "a descriptor has to come with the request".into(),
            },
        },
        Request::Unplug => plugged(machine.plug(None)),
        Request::PowerButton => match machine.press_power_button() {
            Ok(()) => Response::Done,
            Err(error) => Response::Error {
                message: format!("cannot raise the interrupt: {error}"),
            },
        },
        Request::Statistics => Response::Statistics(machine.statistics()),
        Request::Stop => return (Response::Done, Next::Stop),
    };
    (response, Next::Serve)
}

fn plugged(result: Result<(), NetError>) -> Response {
    match result {
        Ok(()) => Response::Done,
        Err(error) => Response::Error {
            message: chain(&error),
        },
    }
}

/// The two oldest descriptors, if there are two.
fn take_two(descriptors: &mut VecDeque<OwnedFd>) -> Option<[OwnedFd; 2]> {
    let first = descriptors.pop_front()?;
    descriptors.pop_front().map(|second| [first, second])
}
