//! ICMP errors about what the node's own processes have sent to Services.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use weir_tests::{TestResult, cluster::cluster_ips, traffic};

use super::support::{PORT, Setup};

/// Sends until the error about a datagram has come.
fn refused(to: SocketAddr) -> Result<()> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(traffic::TIMEOUT / 10))?;
    let deadline = Instant::now() + traffic::TIMEOUT;
    while Instant::now() < deadline {
        // The error about the last one is reported at the next call of any kind.
        let result = socket
            .send(b"anybody?")
            .and_then(|_| socket.recv(&mut [0; 64]));
        match result {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("send or receive"),
            Ok(_) => bail!("an answer of nobody"),
        }
    }
    bail!("no error from {to} within {:?}", traffic::TIMEOUT)
}

/// An endpoint's refusal comes from the Service after translation: the stack takes it for forged
/// (RFC 3704) where it comes by a device that does not lead there.
#[test]
fn errors_of_endpoints_reach_the_node_in_spite_of_strict_source_checks() -> TestResult {
    let mut setup = Setup::start("errors", |_| {})?;
    let [here, far] = [0, 1].map(|at| setup.endpoints[at].endpoints());
    setup.stop_servers();
    let node = setup.node();
    for device in node.netns.devices()? {
        // The agent sets those of its own.
        if device.starts_with("eth") {
            node.netns
                .sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "1")?;
        }
    }
    for (endpoint, place) in [(here, "this node"), (far, "another node")] {
        setup
            .cluster
            .endpoints("web", super::support::TARGET, &endpoint)?;
        setup.cluster.wait_applied()?;
        for address in cluster_ips(10) {
            let to = SocketAddr::new(address, PORT);
            node.netns
                .run(|| refused(to))
                .with_context(|| format!("endpoint on {place}"))?;
        }
    }
    Ok(())
}
