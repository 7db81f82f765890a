use super::super::first_container::Container;
use super::*;
use lighter_protocol::agent::Step;
use lighter_protocol::supervisor::{BootClock, Timeline};

const MS: u64 = 1_000_000;

/// A boot whose process was started at 1000 ms, and whose guest's clock began 60 ms later.
fn measured() -> Measured {
    let step = |name: &str, began_ms: i64, ended_ms: i64| Step {
        name: name.into(),
        began_ns: began_ms * MS as i64,
        ended_ns: ended_ms * MS as i64,
    };
    Measured {
        timeline: Timeline {
            supervisor_started_ns: Some(1010 * MS),
            monitor_started_ns: Some(1020 * MS),
            monitor_ready_ns: Some(1030 * MS),
            guest_entered_ns: Some(1040 * MS),
            agent_running_ns: Some(1400 * MS),
            engine_ready_ns: Some(2000 * MS),
        },
        boot_clock: Some(BootClock {
            offset_ns: -(1060 * MS as i64),
            round_trip_ns: 3 * MS,
        }),
        answered_ns: 2010 * MS,
        console: Milestones {
            agent_running_ns: 1390 * MS,
            agent_running_kernel_us: Some(290_000),
            engine_ready_ns: 2005 * MS,
        },
        steps: vec![
            step("agent", 310, 315),
            step("network", 320, 325),
            step("data-disk-mount", 330, 350),
            step("kernel", 0, 300),
            step("root-disk-mounted", 250, 250),
            step("containerd", 360, 600),
            step("dockerd", 360, 900),
        ],
        counters: Counters::new(),
        container: Some(Container {
            image_loaded_ns: 2100 * MS,
            first_byte_ns: 2500 * MS,
        }),
        memory: Memory::default(),
    }
}

#[test]
fn stamps_of_guest_and_host_are_on_one_clock() {
    let run = Run::new(1000 * MS, &measured()).unwrap();
    let times: Vec<f64> = run.milestones_ms.values().copied().collect();
    assert_eq!(
        times,
        [
            0.0, 10.0, 20.0, 30.0, 40.0, 60.0, 310.0, 360.0, 370.0, 400.0, 385.0, 410.0, 660.0, 960.0,
            1010.0, 1100.0, 1500.0
        ]
    );
    assert_eq!(run.clock_error_ms, 1.5);
    assert_eq!(run.console.engine_ready_ms, 1005.0);
    assert_eq!(START.ms(&run), Some(1010.0));
}

#[test]
fn every_milestone_but_the_first_ends_one_phase() {
    let run = Run::new(1000 * MS, &measured()).unwrap();
    let ends: Vec<Milestone> = PHASES.iter().map(|phase| phase.to).collect();
    let milestones: Vec<Milestone> = run.milestones_ms.keys().copied().collect();
    assert_eq!(ends, milestones[1..]);
    assert!(PHASES.iter().all(|phase| phase.from < phase.to));
}

#[test]
fn a_missing_stamp_is_named() {
    let mut late = measured();
    late.steps.retain(|step| step.name != "containerd");
    let error = Run::new(0, &late).unwrap_err();
    assert!(error.message.contains("step containerd"), "{error}");
    let mut unknown = measured();
    unknown.boot_clock = None;
    assert!(Run::new(0, &unknown).unwrap_err().message.contains("clock"));
}

#[test]
fn a_run_survives_its_json() {
    let run = Run::new(1000 * MS, &measured()).unwrap();
    let json = serde_json::to_value(&run).unwrap();
    assert_eq!(json["milestones_ms"]["kernel-done"], 360.0);
    assert_eq!(serde_json::from_value::<Run>(json).unwrap(), run);
}

/// Boots that differ, as boots do: the phases of run `index` are longer by a part that depends on it.
pub fn runs(count: u32, slowness: f64) -> Vec<Run> {
    let run = |index: u32| {
        let mut run = Run::new(1000 * MS, &measured()).unwrap();
        for (place, ms) in run.milestones_ms.values_mut().enumerate() {
            let wave = f64::from(index * 7 + place as u32 * 3) % 5.0;
            *ms *= slowness * (1.0 + f64::from(index) / 20.0);
            *ms += wave / 2.0;
        }
        run.milestones_ms.insert(Milestone::ProcessStarted, 0.0);
        run
    };
    (0..count).map(run).collect()
}

#[test]
fn the_median_run_is_one_of_them() {
    let runs = runs(4, 1.0);
    assert_eq!(median_run(&runs), Some(&runs[1]));
    assert_eq!(median_run(&[]), None);
}
