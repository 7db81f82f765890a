//! Compiles `src/cage/filters.json` to instructions.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::{env, fs};

const SOURCE: &str = "src/cage/filters.json";
/// What each kind of thread may do besides its own.
const EVERY: &str = "every";
/// What the kernel is to answer as if it did not have it.
const NOT_THERE: &str = "not_there";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    let text = fs::read_to_string(SOURCE).expect("the filters are there");
    let lists: serde_json::Map<String, Value> = serde_json::from_str(&text).expect("filters are JSON");
    let every = rules(&lists, EVERY);
    let mut code = String::new();
    for name in lists.keys().filter(|name| *name != EVERY) {
        let own = rules(&lists, name);
        let (rules, actions) = match name.as_str() {
            NOT_THERE => (own, [("kill", "allow"), ("log", "allow")]),
            _ => (
                [every.clone(), own].concat(),
                [("kill", "kill_process"), ("log", "log")],
            ),
        };
        check(name, &rules);
        let programs =
            actions.map(|(field, otherwise)| format!("{field}: &{:?}", compile(name, &rules, otherwise)));
        code += &format!(
            "static {}: Filter = Filter {{ {} }};\n",
            name.to_uppercase(),
            programs.join(", ")
        );
    }
    let out = env::var("OUT_DIR").expect("cargo sets it");
    fs::write(Path::new(&out).join("filters.rs"), code).expect("the build folder can be written");
}

fn rules(lists: &serde_json::Map<String, Value>, name: &str) -> Vec<Value> {
    let rules = lists[name].as_array().expect("each list is an array");
    for rule in rules {
        assert!(
            rule["comment"].is_string(),
            "{name}: a rule without a reason: {rule}"
        );
    }
    rules.clone()
}

/// A call that is allowed with any arguments and with some would be allowed with those alone.
fn check(list: &str, rules: &[Value]) {
    for rule in rules.iter().filter(|rule| rule.get("args").is_none()) {
        let same = rules.iter().filter(|other| other["syscall"] == rule["syscall"]);
        assert_eq!(same.count(), 1, "{list}: more than one rule beside {rule}");
    }
}

/// An instruction of a filter: its code, two jumps, and its operand (linux/filter.h).
type Line = (u16, u8, u8, u32);

/// A system call's number, and what is to be done when it is the loaded one.
type Program = (u32, Vec<Line>);

/// Calls that are looked for one after another.
const NEIGHBOURS: usize = 4;

const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_NOT_LESS: u16 = 0x35;

/// What each filter begins with: it looks at the architecture, and loads the call's number.
const HEAD: usize = 4;

/// Compiles `rules`. seccompiler's own filters look for a call among all that have rules, one after another; and the kernel asks a filter about
/// every number there is when it is loaded, which each thread of each monitor waits for; and compiles it.
/// A search by halves makes the one short, ends in common the other.
fn compile(list: &str, rules: &[Value], otherwise: &str) -> Vec<Line> {
    let mut calls: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for rule in rules {
        let name = rule["syscall"].as_str().expect("a rule is of a system call");
        calls.entry(name).or_default().push(rule);
    }
    let mut head = vec![];
    let mut programs = BTreeMap::new();
    for rules in calls.values() {
        let program = compile_call(list, rules, otherwise);
        let [
            start @ ..,
            (JUMP_IF_EQUAL, 0, 1, number),
            (JUMP, _, _, 1),
            (JUMP, _, _, _),
        ] = &program[..HEAD + 3]
        else {
            panic!("seccompiler's filters do not begin as they did: {program:?}");
        };
        let own = &program[HEAD + 3..program.len() - 1];
        assert_eq!(
            own.last(),
            program.last(),
            "seccompiler's filters do not end as they did"
        );
        programs.insert(*number, own.to_vec());
        head = start.to_vec();
    }
    let programs: Vec<_> = programs.into_iter().collect();
    // Neighbours that are listed whatever they are asked for have one end.
    let together = |a: &Program, b: &Program| a.1.len() == 2 && a.1 == b.1;
    let runs = programs.chunk_by(together).flat_map(|run| run.chunks(NEIGHBOURS));
    let leaves: Vec<_> = runs.map(|run| (run[0].0, leaf(run))).collect();
    [head, search(&leaves)].concat()
}

/// Looks whether the call that was loaded is one of `calls`, which have the same lines but for their numbers.
fn leaf(calls: &[Program]) -> Vec<Line> {
    let (_, own) = &calls[0];
    let jump = |lines: usize| u8::try_from(lines).expect("no call has so many rules");
    match &own[..] {
        [listed, otherwise] => {
            let looks = calls.iter().enumerate();
            let looks = looks.map(|(at, (number, _))| (JUMP_IF_EQUAL, jump(calls.len() - at), 0, *number));
            let looks: Vec<Line> = looks.collect();
            [&looks[..], &[*otherwise, *listed]].concat()
        }
        // The last of them is what becomes of all else.
        _ => [&[(JUMP_IF_EQUAL, 0, jump(own.len() - 1), calls[0].0)], &own[..]].concat(),
    }
}

/// The filter for one system call, by itself.
fn compile_call(list: &str, rules: &[&Value], otherwise: &str) -> Vec<Line> {
    const ENOSYS: u32 = 38;
    let listed = match list {
        NOT_THERE => serde_json::json!({ "errno": ENOSYS }),
        _ => "allow".into(),
    };
    let filter = serde_json::json!({
        list: { "mismatch_action": otherwise, "match_action": listed, "filter": rules }
    });
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let arch = arch
        .as_str()
        .try_into()
        .expect("seccompiler knows the architecture");
    let programs = seccompiler::compile_from_json(filter.to_string().as_bytes(), arch);
    let mut programs = programs.unwrap_or_else(|error| panic!("{list}: {error}"));
    let program = programs.remove(list).expect("it was the only one");
    program
        .iter()
        .map(|line| (line.code, line.jt, line.jf, line.k))
        .collect()
}

/// Goes on with the one of `leaves`, sorted by their first numbers, that the loaded call may be in.
fn search(leaves: &[Program]) -> Vec<Line> {
    if let [(_, leaf)] = leaves {
        return leaf.clone();
    }
    let (low, high) = leaves.split_at(leaves.len() / 2);
    let (pivot, low, high) = (high[0].0, search(low), search(high));
    let length = u32::try_from(low.len()).expect("the kernel takes 4096 lines");
    let node = match u8::try_from(length) {
        Ok(length) => vec![(JUMP_IF_NOT_LESS, length, 0, pivot)],
        Err(_) => vec![(JUMP_IF_NOT_LESS, 0, 1, pivot), (JUMP, 0, 0, length)],
    };
    [node, low, high].concat()
}
