//! What Lighter is made of: where it comes from, under which licences, and how much of it the compiler does not check.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Licences of which Lighter can be made: none asks for more than to be named.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// The only place from which others' code comes, besides the repository.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace")
        .into()
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .current_dir(repository())
        .output()
        .expect("cargo");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    serde_json::from_value(metadata["packages"].take()).expect("a list")
}

fn architecture() -> String {
    std::fs::read_to_string(repository().join("docs/architecture.md")).expect("read")
}

/// Whether a choice that `expression` (SPDX) leaves is among [`LICENCES`].
fn is_allowed(expression: &str) -> bool {
    let expression = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = expression.split_whitespace().collect();
    let mut at = 0;
    let allowed = either(&words, &mut at);
    assert_eq!(at, words.len(), "{expression} is not understood");
    allowed
}

fn either(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = both(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        allowed |= both(words, at);
    }
    allowed
}

fn both(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = one(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        allowed &= one(words, at);
    }
    allowed
}

fn one(words: &[&str], at: &mut usize) -> bool {
    let name = words[*at];
    *at += 1;
    if name == "(" {
        let allowed = either(words, at);
        assert_eq!(words.get(*at), Some(&")"), "{words:?} is not understood");
        *at += 1;
        return allowed;
    }
    if words.get(*at) == Some(&"WITH") {
        *at += 2;
        return LICENCES.contains(&words[*at - 3..*at].join(" ").as_str());
    }
    LICENCES.contains(&name)
}

#[test]
fn licences_are_read_as_they_are_meant() {
    assert!(is_allowed("MIT/Apache-2.0"));
    assert!(is_allowed("Unlicense OR MIT"));
    assert!(is_allowed("(MIT OR GPL-3.0) AND Unicode-3.0"));
    assert!(is_allowed("Apache-2.0 WITH LLVM-exception OR GPL-2.0"));
    assert!(!is_allowed("GPL-2.0"));
    assert!(!is_allowed("MIT AND GPL-2.0"));
    assert!(!is_allowed("GPL-3.0 AND MIT OR MIT AND LGPL-2.1"));
    assert!(!is_allowed("Apache-2.0 WITH Other-exception"));
}

#[test]
fn every_dependency_has_a_licence_that_we_can_use_and_comes_from_the_registry() {
    let mut wrong = vec![];
    for package in packages() {
        let (name, licence) = (&package["name"], package["license"].as_str());
        if !licence.is_some_and(is_allowed) {
            wrong.push(format!("{name} has the licence {licence:?}"));
        }
        if !(package["source"].is_null() || package["source"] == REGISTRY) {
            wrong.push(format!("{name} is from {}", package["source"]));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_direct_dependency_has_its_reason_in_the_documentation() {
    let text = architecture();
    let mut without = vec![];
    for package in packages().iter().filter(|package| package["source"].is_null()) {
        for dependency in package["dependencies"].as_array().expect("a list") {
            let name = dependency["name"].as_str().expect("a name");
            if dependency["path"].is_null() && !text.contains(&format!("`{name}`")) {
                without.push(format!("{name} of {}", package["name"]));
            }
        }
    }
    assert!(
        without.is_empty(),
        "docs/architecture.md says nothing of {without:#?}"
    );
}

/// How often the files below `folder` say `unsafe` outside of comments.
fn unsafes(folder: &Path) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            count += unsafes(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).expect("read");
            let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let words = ["{", "impl", "fn", "extern"].map(|what| format!("unsafe {what}"));
            count += lines
                .filter(|line| words.iter().any(|word| line.contains(word)))
                .count();
        }
    }
    count
}

/// So that one more is seen by whoever reads the change. That each says why it is right is a lint.
#[test]
fn unsafe_code_is_counted() {
    let text = architecture();
    let table = text.split("## Unsafe code").nth(1).expect("its section");
    let rows = table.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let folder = cells.next()?.trim().trim_end_matches("/`").to_owned();
        Some((folder, cells.next()?.trim().parse().ok()?))
    });
    let said: BTreeMap<String, usize> = rows.collect();
    let folders = [
        "vmm",
        "launcher",
        "protocol",
        "measure",
        "relay",
        "disk",
        "guest-agent",
    ];
    let counted = folders.map(|folder| (folder.to_owned(), unsafes(&repository().join(folder).join("src"))));
    let counted: BTreeMap<_, _> = counted.into_iter().filter(|(_, count)| *count > 0).collect();
    assert_eq!(counted, said, "what there is, and what docs/architecture.md says");
}
