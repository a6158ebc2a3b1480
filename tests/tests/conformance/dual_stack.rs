//! Upstream's `test/e2e/network/dual_stack.go`, without its granular checks: those of
//! `networking.rs` go over both families.

use std::net::SocketAddr;

use serde_json::json;
use weir_tests::{Cluster, Families, TestResult, cluster::cluster_ips, traffic::Protocol};

use super::support::{Backends, PORT, TARGET, is_served_by, is_unreachable, is_up, name};

/// "should be able to reach pod on ipv4 and ipv6 ip". Limit: 5 min.
#[test]
fn pods_are_reached_on_both_addresses() -> TestResult {
    let cluster = Cluster::builder("dual stack pods").start()?;
    let on = ["node1", "node2"];
    let servers = Backends::start(&cluster, "dualstack-server-", &on)?;
    for node in on {
        let client = cluster.pod(node, &format!("client-{node}"))?;
        assert_eq!(client.addresses.len(), 2, "{:?}", client.addresses);
        for server in &servers.pods {
            for v6 in [false, true] {
                let to = SocketAddr::new(server.address(v6)?, TARGET);
                is_served_by(&client.netns, Protocol::Tcp, to, &name(server))?;
            }
        }
    }
    Ok(())
}

/// "should create a single stack service with cluster ip from primary service range", "should
/// create service with ipv4 cluster ip", "… ipv6 cluster ip", "… ipv4,v6 cluster ip" and "…
/// ipv6,v4 cluster ip": what they create is served, and nothing else. Limit: 2 min.
#[test]
fn services_serve_the_families_that_they_have() -> TestResult {
    let cluster = Cluster::builder("dual stack services").start()?;
    let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
    let client = cluster.pod("node1", "client")?;
    let [v4, v6] = cluster_ips(10);
    for vips in [vec![v4], vec![v6], vec![v4, v6], vec![v6, v4]] {
        backends.serve(&cluster, "families", &vips, |service| {
            service["spec"]["ipFamilyPolicy"] = if vips.len() > 1 {
                json!("RequireDualStack")
            } else {
                json!("SingleStack")
            };
        })?;
        is_up(&client.netns, &vips, &backends.names())?;
        for other in [v4, v6].iter().filter(|ip| !vips.contains(ip)) {
            let to = SocketAddr::new(*other, PORT);
            is_unreachable(&client.netns, Protocol::Tcp, to)?;
        }
    }
    Ok(())
}

/// The same on clusters of one family.
#[test]
fn services_work_on_clusters_of_one_family() -> TestResult {
    for families in [Families::V4, Families::V6] {
        let cluster = Cluster::builder("single stack")
            .families(families)
            .start()?;
        let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
        let client = cluster.pod("node1", "client")?;
        let v6 = families == Families::V6;
        let vips: Vec<_> = cluster_ips(10)
            .into_iter()
            .filter(|ip| ip.is_ipv6() == v6)
            .collect();
        backends.serve(&cluster, "single", &vips, |_| {})?;
        is_up(&client.netns, &vips, &backends.names())?;
    }
    Ok(())
}
