//! What the programs cost the verifier, against `ebpf/verifier-budget.toml`.

use std::{collections::BTreeMap, fs, path::Path};

use weir_agent::datapath::verify::{Switches, verify};

const FILE: &str = "ebpf/verifier-budget.toml";

/// Lines of the form `name = number`; the rest is comment.
fn budget() -> BTreeMap<String, u32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(FILE);
    fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .map(|line| {
            let (name, number) = line.split_once('=').expect("name = number");
            let number = number.trim().replace('_', "");
            (name.trim().to_owned(), number.parse().expect("a number"))
        })
        .collect()
}

#[test]
fn no_program_costs_the_verifier_more_than_its_budget() {
    let budget = budget();
    let mut over = Vec::new();
    for switches in Switches::ALL {
        for program in verify(switches).unwrap() {
            let name = program.name;
            let Some(verified) = program.verified_instructions else {
                eprintln!("this kernel does not tell (before 5.16)");
                return;
            };
            let most = budget[name];
            println!(
                "{name} ({}): {verified} of {most} verified instructions, {} ms",
                switches.name(),
                program.time.as_millis()
            );
            // Counting lookups is for tests only, the packet log for developers.
            let is_shipped = switches == Switches::Default && !cfg!(feature = "log-packets");
            if is_shipped && verified > most {
                over.push(format!(
                    "{name}: {verified} verified instructions, budget {most}"
                ));
            }
        }
    }
    assert!(
        over.is_empty(),
        "{}; raise it in {FILE} only with a reason",
        over.join("; ")
    );
}
