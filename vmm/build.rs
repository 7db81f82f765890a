//! Compiles `src/cage/filters.json` to instructions.

use serde_json::Value;
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

fn compile(name: &str, rules: &[Value], otherwise: &str) -> Vec<(u16, u8, u8, u32)> {
    const ENOSYS: u32 = 38;
    let listed = match name {
        NOT_THERE => serde_json::json!({ "errno": ENOSYS }),
        _ => "allow".into(),
    };
    let filter = serde_json::json!({
        name: { "mismatch_action": otherwise, "match_action": listed, "filter": rules }
    });
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let arch = arch
        .as_str()
        .try_into()
        .expect("seccompiler knows the architecture");
    let programs = seccompiler::compile_from_json(filter.to_string().as_bytes(), arch);
    let mut programs = programs.unwrap_or_else(|error| panic!("{name}: {error}"));
    let program = programs.remove(name).expect("it was the only one");
    program
        .iter()
        .map(|line| (line.code, line.jt, line.jf, line.k))
        .collect()
}
