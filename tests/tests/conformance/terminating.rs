//! Endpoints that are not ready or about to end, from upstream's `test/e2e/network/service.go`.

use anyhow::Result;
use weir_tests::{Cluster, TestResult, cluster::cluster_ips};

use super::support::{Backends, apply_slices, is_up, terminating};

/// "should fallback to terminating endpoints when there are no ready endpoints with
/// internalTrafficPolicy=Cluster". Limit: five times in 25 s.
#[test]
fn falls_back_to_terminating_endpoints() -> TestResult {
    let cluster = Cluster::builder("terminating").start()?;
    let backends = Backends::start(&cluster, "echo-hostname-", &["node1", "node2"])?;
    let clients = [
        cluster.pod("node1", "pause1")?,
        cluster.pod("node2", "pause2")?,
    ];
    let vips = cluster_ips(10);
    backends.serve(&cluster, "svc-proxy-terminating", &vips, |_| {})?;
    let endpoints = backends.endpoints();
    let check = |names: &[&str]| -> Result<()> {
        clients
            .iter()
            .try_for_each(|client| is_up(&client.netns, &vips, names))
    };
    // While one is ready, the terminating one gets nothing new.
    apply_slices(
        &cluster,
        "svc-proxy-terminating",
        &endpoints,
        |number, endpoint| {
            if number == 0 {
                terminating(endpoint);
            }
        },
    )?;
    check(&backends.names()[1..])?;
    apply_slices(
        &cluster,
        "svc-proxy-terminating",
        &endpoints,
        |_, endpoint| {
            terminating(endpoint);
        },
    )?;
    check(&backends.names())?;
    // One that does not serve any more is no fall-back.
    apply_slices(
        &cluster,
        "svc-proxy-terminating",
        &endpoints,
        |number, endpoint| {
            terminating(endpoint);
            if number == 0 {
                endpoint["conditions"]["serving"] = false.into();
            }
        },
    )?;
    Ok(check(&backends.names()[1..])?)
}
