use super::*;

#[test]
fn hardware_is_good() {
    let report = Report::new(3_000_000_000, vec![]);
    assert!(report.runs_linux());
    assert_eq!(
        report.to_string(),
        "KVM here executes guest code: 3000 million ring-0 instructions a second: Linux guests run"
    );
}

#[test]
fn an_interpreter_is_refused_and_its_gaps_are_named() {
    let report = Report::new(9_800_000, vec!["cmpxchg16b", "int3 in long mode"]);
    assert!(!report.runs_linux());
    let words = report.to_string();
    assert!(
        words.starts_with(
            "KVM here interprets guest code: 9.8 million ring-0 instructions a second, and lacks cmpxchg16b, \
             int3 in long mode: Linux guests will not boot. "
        ),
        "{words}"
    );
}

#[test]
fn one_missing_instruction_is_enough() {
    assert!(!Report::new(3_000_000_000, vec!["xsave"]).runs_linux());
}

#[test]
fn a_slow_interpreter_without_gaps_is_refused() {
    assert!(!Report::new(SLOWEST_VIRTUALIZATION - 1, vec![]).runs_linux());
    assert!(Report::new(SLOWEST_VIRTUALIZATION, vec![]).runs_linux());
}

#[test]
fn rate_is_per_second() {
    assert_eq!(rate(1_000, Duration::from_millis(100)), 10_000);
}

#[test]
fn every_check_fits_its_page_and_names_are_unique() {
    let checks = instructions::needed(true);
    let mut names: Vec<_> = checks.iter().map(|check| check.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), checks.len());
    assert!(checks.iter().all(|check| check.code.len() < 0x1000 - 16));
    assert_eq!(instructions::needed(false).len() + 1, checks.len());
}

/// On a host without KVM there is nothing to measure; one that there is must open.
fn kvm() -> Option<Kvm> {
    if !std::path::Path::new("/dev/kvm").exists() {
        eprintln!("no /dev/kvm: run this in scripts/with-kvm");
        return None;
    }
    Some(Kvm::new().expect("/dev/kvm opens"))
}

#[test]
fn the_probe_of_this_host_is_consistent() {
    let Some(kvm) = kvm() else { return };
    let report = probe(&kvm).unwrap();
    assert!(report.instructions_per_second > 10_000, "{report}");
    assert_eq!(
        report,
        Report::new(report.instructions_per_second, report.missing.clone())
    );
    // These even an interpreter has.
    assert!(!report.missing.contains(&"cpuid"), "{report}");
}

#[test]
fn an_instruction_that_does_not_exist_is_found_out() {
    let Some(kvm) = kvm() else { return };
    // ud2
    let mut guest = Guest::new(&kvm, &[0x0f, 0x0b]).unwrap();
    assert_ne!(guest.run(0).unwrap(), Outcome::Passed);
}

#[test]
fn a_wrong_result_is_found_out() {
    let Some(kvm) = kvm() else { return };
    // xor eax, eax; je bad
    let mut guest = Guest::new(&kvm, &[0x31, 0xc0, 0x74, 0x06]).unwrap();
    assert_eq!(
        guest.run(0).unwrap(),
        Outcome::Failed("it computes something else".into())
    );
}
