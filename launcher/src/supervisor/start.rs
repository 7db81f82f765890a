//! The start of a monitor, with all that stands around it.

use super::agent::GuestLogs;
use super::demand::Demand;
use super::identity::Whose;
use super::lines::Lines;
use super::network::{Keeper, Way, passt};
use super::ports::Publisher;
use super::ports::elsewhere::Elsewhere;
use super::ports::random::Block;
use super::snapshot::MachineFacts;
use super::standby::IdleWatch;
use super::suspension::Resumption;
use super::template::Template;
use super::{Lasting, Supervisor};
use super::{agent, engine_settings, identity, machine, monitor, names, network, ports, working_set};
use crate::boot::Begin;
use crate::config::Config;
use crate::error::{Context, Result};
use crate::logs::{LogFile, Source};
use crate::paths::Paths;
use crate::snapshots::base::Base;
use crate::templates::store;
use crate::vm::Vm;
use lighter_protocol::supervisor::Origin;
use std::sync::{Arc, Mutex};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

impl<'a> Supervisor<'a> {
    /// Opens what the monitor of `vm` needs, starts it, and serves its guest.
    ///
    /// # Errors
    /// What cannot be had; nothing of the VM runs then.
    pub(super) async fn start(
        paths: &Paths,
        vm: &'a Vm,
        begin: Begin<'_>,
        lasting: &Lasting,
        random_ports: Option<&Block>,
        demands: mpsc::Sender<Demand>,
    ) -> Result<Self> {
        let Lasting { state, ports, .. } = lasting;
        let (resumption, base) = match begin {
            Begin::From(folder) => (None, Some(Base::load(folder)?)),
            Begin::Boot | Begin::BootForTemplate => Resumption::begin(vm)?.unzip(),
        };
        state.origin(match (begin, &resumption) {
            (Begin::From(folder), _) => {
                store::name_of(paths, folder).map_or(Origin::Snapshot, Origin::Template)
            }
            (_, Some(_)) => Origin::Suspension,
            (_, None) => Origin::Boot,
        });
        let whose = match resumption {
            Some(_) => Whose::Its,
            None => Whose::AnotherS,
        };
        let network = network::prepare(vm, base.as_ref(), whose, state)?;
        let for_guest = random_ports.map(|block| &block.ports);
        let prepared = machine::prepare(paths, vm, base.as_ref(), network.device, for_guest)?;
        let events = pipe::Receiver::from_owned_fd(prepared.events)
            .context(|| "cannot watch the monitor's events".into())?;
        let agents = agent::Connections::new(prepared.agent)
            .context(|| "cannot watch the agent's connections".into())?;
        let names = agent::Connections::new(prepared.names)
            .context(|| "cannot watch the guest's questions about names".into())?;
        let proxies = agent::Connections::new(prepared.proxies)
            .context(|| "cannot watch the connections of published ports".into())?;
        let publisher = Publisher {
            ports: ports.clone(),
            policy: prepared.policy,
            elsewhere: Elsewhere::new(for_guest.cloned()),
            muxer: vm.paths.vsock_socket(),
            usage: lasting.usage.clone(),
        };
        let logs = || format!("cannot open the logs in {}", vm.paths.data.display());
        let guest_logs = GuestLogs::open(&vm.paths).context(logs)?;
        let monitor_log = LogFile::open(vm.paths.log(Source::Monitor)).context(logs)?;
        let engine = engine_settings::of(&vm.settings, &Config::load(&paths.config_file)?);
        let facts = MachineFacts {
            network: prepared.machine.net.is_some(),
            mounts: prepared.mounts,
            booted_from: prepared.booted_from.clone(),
        };
        let template = match begin {
            Begin::BootForTemplate if base.is_none() => {
                Template::of(paths, vm, &facts, &engine, &lasting.snapshots, state)
            }
            _ => None,
        };
        // From here on nothing fails: a suspended VM could not be told from one that has changed its disk.
        let (process, stderr) = monitor::start(&prepared.machine, prepared.inherited).await?;
        state.monitor_started(process.id());
        let identity = base
            .as_ref()
            .map(|_| identity::Giver::new(vm, whose, for_guest, state));
        lasting.snapshots.machine(facts);
        let mut tasks = JoinSet::new();
        if let Some(base) = base.as_ref().filter(|base| working_set::is_wanted(base)) {
            let (folder, monitor) = (base.folder.clone(), vm.paths.monitor_socket());
            tasks.spawn(working_set::note_when_ready(folder, monitor, state.clone()));
        }
        if let Some(template) = template {
            tasks.spawn(template.make());
        }
        tasks.spawn(names::serve(names, names::Resolver::new(network.host)));
        tasks.spawn({
            let state = state.clone();
            async move {
                if identity::is_itself(&state).await {
                    ports::serve(proxies, publisher).await;
                }
            }
        });
        let (orders, passts) = mpsc::channel(1);
        if let Way::Passt(first) = network.way {
            let keeper = Keeper {
                monitor: vm.paths.monitor_socket(),
                host_access: vm.settings.host_access,
                state: state.clone(),
                orders,
            };
            match first {
                Some(passt) if base.is_some() => tasks.spawn(keeper.run_on_demand(passt)),
                // While the guest boots: it takes as long as the monitor's own start.
                first => tasks.spawn(keeper.run(first.map(passt::start))),
            };
        }
        let idle = IdleWatch {
            name: vm.name.to_string(),
            lasting: lasting.clone(),
            demands,
        };
        tasks.spawn(idle.run());
        Ok(Self {
            vm,
            lasting: lasting.clone(),
            from: base.map(|base| base.folder),
            resumption,
            booted_from: prepared.booted_from,
            events: Lines::new(events, monitor::MAX_LINE),
            agents,
            logs: Arc::new(Mutex::new(guest_logs)),
            orders: None,
            agent: None,
            passts,
            engine,
            identity,
            tasks,
            stderr: tokio::spawn(monitor::log_stderr(stderr, monitor_log)),
            process,
        })
    }
}
