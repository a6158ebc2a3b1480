//! kube-proxy as far as a node's traffic sees it: the rules that it makes for a Service, in each of its
//! modes, and their removal. Chains and their order are those that Kubernetes documents ("Virtual IPs
//! and Service Proxies"; KEP-3866 for nftables).

use std::{
    fmt::{Display, Write as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{netns::NetNs, process};

/// Chains of iptables, besides those of endpoints; the first is what the hooks jump to.
const CHAINS: [&str; 6] = [
    "KUBE-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-EXT",
    "KUBE-SVC",
];
/// Jumps out of the kernel's chains.
const JUMPS: [&str; 3] = [
    "PREROUTING -j KUBE-SERVICES",
    "OUTPUT -j KUBE-SERVICES",
    "POSTROUTING -j KUBE-POSTROUTING",
];
/// Mark bit that asks for masquerade: `iptables.masqueradeBit` 14, the default.
const MASQUERADE: &str = "0x4000/0x4000";
/// How long rules may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What carries the rules: kube-proxy's `mode`, and the back end of iptables.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// `iptables` with the nft back end.
    IptablesNft,
    /// `iptables` with the back end of old.
    IptablesLegacy,
    /// `nftables`.
    Nftables,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::IptablesNft, Self::IptablesLegacy, Self::Nftables];
}

/// A Service for TCP and UDP, of one family.
#[derive(Clone, Debug)]
pub struct Service {
    /// ClusterIP and port.
    pub frontend: SocketAddr,
    /// Port at the node's addresses.
    pub node_port: u16,
    /// Where it leads to, each with the same chance.
    pub endpoints: Vec<SocketAddr>,
}

/// kube-proxy's rules for one Service of a family on one node.
#[derive(Clone, Debug)]
pub struct Rules {
    mode: Mode,
    service: Service,
    /// Range of pods, which are not masqueraded.
    pods: String,
}

impl Rules {
    /// Loads them into the node's namespace; `pods` is the range of pods.
    ///
    /// # Errors
    ///
    /// When the mode's program is not installed, or refuses.
    pub fn load(node: &NetNs, mode: Mode, service: Service, pods: &str) -> Result<Self> {
        let rules = Self {
            mode,
            service,
            pods: pods.to_owned(),
        };
        let text = match mode {
            Mode::Nftables => rules.nftables(),
            Mode::IptablesNft | Mode::IptablesLegacy => rules.iptables(),
        };
        rules.restore(node, &text)?;
        Ok(rules)
    }

    /// Takes them away, as `kube-proxy --cleanup` does.
    ///
    /// # Errors
    ///
    /// When they are not there.
    pub fn remove(&self, node: &NetNs) -> Result<()> {
        let mut text = String::new();
        if self.mode == Mode::Nftables {
            line(&mut text, format!("delete table {} kube-proxy", self.ip()));
            return self.restore(node, &text);
        }
        self.begin(&mut text);
        for jump in JUMPS {
            line(&mut text, format_args!("-D {jump}"));
        }
        for chain in self.chains() {
            line(&mut text, format_args!("-X {chain}"));
        }
        line(&mut text, "COMMIT");
        self.restore(node, &text)
    }

    fn restore(&self, node: &NetNs, text: &str) -> Result<()> {
        let six = if self.v6() { "6" } else { "" };
        let (program, arguments) = match self.mode {
            Mode::Nftables => ("nft".to_owned(), ["-f", "-"].as_slice()),
            Mode::IptablesNft => (format!("ip{six}tables-nft-restore"), ["-n"].as_slice()),
            Mode::IptablesLegacy => (format!("ip{six}tables-legacy-restore"), ["-n"].as_slice()),
        };
        process::run(
            node.command(&program)?.args(arguments),
            text.as_bytes(),
            TIMEOUT,
        )
        .with_context(|| format!("{program} (of Debian's iptables and nftables): {text}"))?;
        Ok(())
    }

    const fn v6(&self) -> bool {
        matches!(self.service.frontend.ip(), IpAddr::V6(_))
    }

    /// As nftables calls the family.
    const fn ip(&self) -> &'static str {
        if self.v6() { "ip6" } else { "ip" }
    }

    fn chains(&self) -> Vec<String> {
        let endpoints = 0..self.service.endpoints.len();
        let fixed = CHAINS.map(str::to_owned).into_iter();
        fixed.chain(endpoints.map(endpoint_chain)).collect()
    }

    /// Makes the chains, or empties them.
    fn begin(&self, text: &mut String) {
        line(text, "*nat");
        for chain in self.chains() {
            line(text, format_args!(":{chain} - [0:0]"));
        }
    }

    fn iptables(&self) -> String {
        let mut text = String::new();
        self.begin(&mut text);
        for jump in JUMPS {
            line(&mut text, format_args!("-A {jump}"));
        }
        line(
            &mut text,
            format_args!(
                "-A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE} -j RETURN\n\
                 -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
                 -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
                 -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
                 -A KUBE-EXT -j KUBE-MARK-MASQ\n-A KUBE-EXT -j KUBE-SVC"
            ),
        );
        let (frontend, pods) = (self.service.frontend, &self.pods);
        let count = self.service.endpoints.len();
        for protocol in ["tcp", "udp"] {
            let to = format!(
                "-d {} -p {protocol} --dport {}",
                frontend.ip(),
                frontend.port()
            );
            line(
                &mut text,
                format_args!(
                    "-A KUBE-SERVICES {to} -j KUBE-SVC\n\
                     -A KUBE-SVC ! -s {pods} {to} -j KUBE-MARK-MASQ\n\
                     -A KUBE-NODEPORTS -p {protocol} --dport {} -j KUBE-EXT",
                    self.service.node_port
                ),
            );
        }
        for (number, to) in self.service.endpoints.iter().enumerate() {
            let chain = endpoint_chain(number);
            let left = u32::try_from(count - number).unwrap_or(u32::MAX);
            let share = 1.0 / f64::from(left);
            line(
                &mut text,
                format_args!(
                    "-A KUBE-SVC -m statistic --mode random --probability {share:.11} -j {chain}\n\
                     -A {chain} -s {} -j KUBE-MARK-MASQ",
                    to.ip()
                ),
            );
            for protocol in ["tcp", "udp"] {
                line(
                    &mut text,
                    format_args!("-A {chain} -p {protocol} -j DNAT --to-destination {to}"),
                );
            }
        }
        // Must be the last of its chain.
        line(
            &mut text,
            "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT",
        );
        text
    }

    fn nftables(&self) -> String {
        let (ip, frontend, pods) = (self.ip(), self.service.frontend, &self.pods);
        let mut text = format!(
            "table {ip} kube-proxy {{\n\
             chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}\n"
        );
        let mut map = String::new();
        for (number, to) in self.service.endpoints.iter().enumerate() {
            line(
                &mut text,
                format_args!(
                    "chain endpoint-{number} {{\n{ip} saddr {} jump mark-for-masquerade\n\
                     meta l4proto {{ tcp, udp }} dnat to {to}\n}}",
                    to.ip()
                ),
            );
            // Writing to a String cannot fail.
            let _ = write!(map, "{number} : goto endpoint-{number}, ");
        }
        line(
            &mut text,
            format_args!(
                "chain service {{\n\
                 {ip} daddr {} {ip} saddr != {pods} jump mark-for-masquerade\n\
                 numgen random mod {} vmap {{ {map} }}\n}}\n\
                 chain external {{\njump mark-for-masquerade\ngoto service\n}}\n\
                 chain services {{\n\
                 {ip} daddr {} meta l4proto {{ tcp, udp }} th dport {} goto service\n\
                 fib daddr type local meta l4proto {{ tcp, udp }} th dport {} goto external\n}}\n\
                 chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}\n\
                 chain nat-output {{ type nat hook output priority -100; jump services; }}\n\
                 chain nat-postrouting {{\ntype nat hook postrouting priority 100;\n\
                 meta mark and 0x4000 == 0 return\nmeta mark set meta mark xor 0x4000\n\
                 masquerade fully-random\n}}\n}}",
                frontend.ip(),
                self.service.endpoints.len(),
                frontend.ip(),
                frontend.port(),
                self.service.node_port
            ),
        );
        text
    }
}

fn endpoint_chain(number: usize) -> String {
    format!("KUBE-SEP-{number}")
}

fn line(text: &mut String, line: impl Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}
