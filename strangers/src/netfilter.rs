//! Rules of the packet filter, of iptables with either back end and of nftables. Tools of the old back end
//! load modules and make tables when they look: they are only asked where tables are.

use std::{collections::BTreeMap, fs};

use serde_json::Value;

use crate::{
    Findings, Owner, counted,
    rules::{self, Table, ends},
    tools::{ToolError, is_installed, run},
};

/// Why leftovers matter.
const LEFTOVERS: &str = "rules of somebody who is gone send packets to endpoints that are gone, and cost each packet time";
/// Why forwarding matters.
const FORWARDING: &str = "what Weir leaves to the stack, as packets of pods to the outside, may be dropped, and Weir does not see it";

/// The tools of iptables for a family and a back end.
#[derive(Clone, Copy, Debug)]
pub struct Tools {
    /// `iptables-nft` …
    pub name: &'static str,
    save: &'static str,
    restore: &'static str,
    /// Names the tables of the old back end, below `/proc`.
    names: Option<&'static str>,
}

const NFT: [Tools; 2] = [
    Tools {
        name: "iptables-nft",
        save: "iptables-nft-save",
        restore: "iptables-nft-restore",
        names: None,
    },
    Tools {
        name: "ip6tables-nft",
        save: "ip6tables-nft-save",
        restore: "ip6tables-nft-restore",
        names: None,
    },
];
const LEGACY: [Tools; 2] = [
    Tools {
        name: "iptables-legacy",
        save: "iptables-legacy-save",
        restore: "iptables-legacy-restore",
        names: Some("/proc/thread-self/net/ip_tables_names"),
    },
    Tools {
        name: "ip6tables-legacy",
        save: "ip6tables-legacy-save",
        restore: "ip6tables-legacy-restore",
        names: Some("/proc/thread-self/net/ip6_tables_names"),
    },
];

impl Tools {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        NFT.into_iter().chain(LEGACY)
    }

    /// Its tables; none where the old back end has none.
    ///
    /// # Errors
    ///
    /// If it is not installed though it has tables, or fails.
    pub fn tables(self) -> Result<Vec<Table>, ToolError> {
        if let Some(names) = self.names
            && fs::read_to_string(names)
                .unwrap_or_default()
                .trim()
                .is_empty()
        {
            return Ok(Vec::new());
        }
        Ok(rules::parse(&run(self.save, &[], "")?))
    }

    /// Whether `nft` shows its chains, too.
    pub fn is_nft(self) -> bool {
        self.names.is_none()
    }

    /// Takes the text of [`rules::removal`] in: all of a table or nothing.
    ///
    /// # Errors
    ///
    /// If it is not installed, or refuses.
    pub fn restore(self, text: &str) -> Result<(), ToolError> {
        run(self.restore, &["--noflush", "--wait", "5"], text).map(drop)
    }
}

/// A chain of nftables; those of iptables are among them.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Chain {
    family: String,
    table: String,
    name: String,
    hook: String,
    policy: String,
}

fn text(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or_default().to_owned()
}

/// The objects of one kind in what `nft -j` prints.
fn objects(json: &str, kind: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(json).unwrap_or_default();
    let all = all["nftables"].as_array().cloned().unwrap_or_default();
    all.into_iter()
        .filter_map(|object| object.get(kind).cloned())
        .collect()
}

fn chains(json: &str) -> Vec<Chain> {
    let all = objects(json, "chain");
    all.iter()
        .map(|chain| Chain {
            family: text(chain, "family"),
            table: text(chain, "table"),
            name: text(chain, "name"),
            hook: text(chain, "hook"),
            policy: text(chain, "policy"),
        })
        .collect()
}

/// Tables of nftables that belong to somebody, as `nft delete table` wants them: `ip kube-proxy`.
///
/// # Errors
///
/// If `nft` is not installed, or fails.
pub fn own_tables(owner: Owner) -> Result<Vec<String>, ToolError> {
    let json = run("nft", &["-j", "list", "tables"], "")?;
    let tables = objects(&json, "table");
    Ok(tables
        .iter()
        .map(|table| (text(table, "family"), text(table, "name")))
        .filter(|(family, name)| owner.owns_table(family, name))
        .map(|(family, name)| format!("{family} {name}"))
        .collect())
}

/// Whether nftables shows chains of somebody in tables that iptables made.
///
/// # Errors
///
/// If `nft` is not installed, or fails.
pub fn has_chains(owner: Owner) -> Result<bool, ToolError> {
    let chains = chains(&run("nft", &["-j", "list", "chains"], "")?);
    Ok(chains.iter().any(|chain| owner.owns_chain(&chain.name)))
}

/// Removes a table of nftables.
///
/// # Errors
///
/// If `nft` is not installed, or fails.
pub fn remove_table(table: &str) -> Result<(), ToolError> {
    run("nft", &["-f", "-"], &format!("delete table {table}\n")).map(drop)
}

/// See [`crate::look`].
pub fn look(findings: &mut Findings) {
    // By owner and place: the number of chains.
    let mut leftovers: BTreeMap<(&'static str, String), (Owner, usize)> = BTreeMap::new();
    let mut count = |place: &str, chain: &str| {
        if let Some(owner) = Owner::ALL.into_iter().find(|owner| owner.owns_chain(chain)) {
            let entry = leftovers.entry((owner.name(), place.to_owned()));
            entry.or_insert((owner, 0)).1 += 1;
        }
    };
    if is_installed("nft") {
        let json = run("nft", &["-j", "list", "chains"], "");
        for chain in chains(&findings.or_default("nftables", json)) {
            count(
                &format!("table {} {} of nftables", chain.family, chain.table),
                &chain.name,
            );
            if chain.hook == "forward" {
                look_at_forward_chain(&chain, findings);
            }
        }
        let tables = own_tables(Owner::KubeProxy);
        for table in findings.or_default("nftables", tables) {
            let owner = Owner::KubeProxy;
            findings.add(
                format!("the table {table} of nftables is kube-proxy's"),
                LEFTOVERS,
                owner.remedy(),
            );
        }
    } else {
        for tools in NFT.into_iter().filter(|tools| is_installed(tools.save)) {
            let tables = findings.or_default(tools.name, tools.tables());
            look_at_tables(tools, &tables, &mut count, findings);
        }
    }
    for tools in LEGACY.into_iter().filter(|tools| is_installed(tools.save)) {
        let tables = findings.or_default(tools.name, tools.tables());
        look_at_tables(tools, &tables, &mut count, findings);
    }
    for ((name, place), (owner, count)) in leftovers {
        let what = format!("{} of {name} in {place}", counted(count, "chain"));
        findings.add(what, LEFTOVERS, owner.remedy());
    }
}

fn look_at_tables(
    tools: Tools,
    tables: &[Table],
    count: &mut impl FnMut(&str, &str),
    findings: &mut Findings,
) {
    let command = tools.name;
    for table in tables {
        let name = &table.name;
        for (chain, policy) in &table.chains {
            count(&format!("table {name} of {command}"), chain);
            if chain == "FORWARD" && policy == "DROP" {
                findings.add(
                    format!("the policy of FORWARD in table {name} of {command} is DROP"),
                    FORWARDING,
                    format!("{command} -t {name} -P FORWARD ACCEPT"),
                );
            }
        }
        for rule in &table.rules {
            let (chain, target) = ends(rule);
            let drops = matches!(target.as_deref(), Some("DROP" | "REJECT"));
            if drops && chain.as_deref() == Some("FORWARD") {
                findings.add(
                    format!("a rule of FORWARD in table {name} of {command} drops: {rule}"),
                    FORWARDING,
                    format!("{command} -t {name} {}", rule.replacen("-A", "-D", 1)),
                );
            }
        }
    }
}

/// A chain at the hook forward; of iptables FORWARD, too.
fn look_at_forward_chain(chain: &Chain, findings: &mut Findings) {
    let Chain {
        family,
        table,
        name,
        ..
    } = chain;
    // Named as a whole.
    if Owner::ALL
        .into_iter()
        .any(|owner| owner.owns_table(family, table))
    {
        return;
    }
    let place = format!("{family} {table} {name}");
    if chain.policy == "drop" {
        findings.add(
            format!(
                "the policy of the chain {place} of nftables, which sees forwarded packets, is drop"
            ),
            FORWARDING,
            format!("nft chain {place} '{{ policy accept; }}'"),
        );
    }
    let listed = run(
        "nft",
        &["-t", "-a", "list", "chain", family, table, name],
        "",
    );
    for (rule, handle) in dropping_rules(&findings.or_default(&place, listed)) {
        findings.add(
            format!("a rule of the chain {place} of nftables, which sees forwarded packets, drops: {rule}"),
            FORWARDING,
            format!("nft delete rule {place} handle {handle}"),
        );
    }
}

/// Rules that drop or reject in what `nft -a list chain` prints, with their handles.
fn dropping_rules(listed: &str) -> Vec<(String, String)> {
    let rules = listed.lines().filter_map(|line| {
        let (rule, handle) = line.trim().rsplit_once(" # handle ")?;
        // Quoted text, as a comment, says nothing of a verdict.
        let bare: String = rule.split('"').step_by(2).collect();
        let drops = bare
            .split(' ')
            .any(|word| ["drop", "reject"].contains(&word));
        // The heads of table and chain have handles, too.
        (drops && !rule.ends_with('{')).then(|| (rule.to_owned(), handle.to_owned()))
    });
    rules.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_drop_are_found_by_their_verdict() {
        let listed = r#"table ip filter { # handle 1
	chain FORWARD { # handle 2
		type filter hook forward priority filter; policy drop;
		ip saddr 192.0.2.1 counter packets 0 bytes 0 drop # handle 5
		ip saddr 192.0.2.2 reject with icmp port-unreachable # handle 6
		ip saddr 192.0.2.3 accept comment "do not drop this" # handle 7
		jump drop-chain # handle 8
	}
}
"#;
        let found = dropping_rules(listed);
        let handles: Vec<&str> = found.iter().map(|(_, handle)| handle.as_str()).collect();
        assert_eq!(handles, ["5", "6"], "{found:?}");
    }

    #[test]
    fn chains_are_read_from_json() {
        let json = r#"{"nftables": [{"metainfo": {"version": "1"}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 2,
             "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "ip", "table": "nat", "name": "KUBE-SERVICES", "handle": 3}}]}"#;
        let chains = chains(json);
        assert_eq!(chains.len(), 2);
        assert_eq!(
            (chains[0].hook.as_str(), chains[0].policy.as_str()),
            ("forward", "drop")
        );
        assert_eq!(
            (chains[1].name.as_str(), chains[1].hook.as_str()),
            ("KUBE-SERVICES", "")
        );
        assert!(super::chains("no JSON").is_empty());
    }
}
