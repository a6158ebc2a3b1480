//! Endpoints that are not ready or about to end, from upstream's `test/e2e/network/service.go`.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{Cluster, TestResult, cluster::cluster_ips, outside::Outside, traffic::Protocol};

use super::support::{
    Backends, apply_slices, is_down, is_refused, is_served_by, is_up, terminating,
};

const NODE_PORT: u16 = 30_080;

/// Conditions as the EndpointSlice controller sets them for a pod that is not ready.
fn conditions(ready: bool, serving: bool, terminating: bool) -> impl Fn(usize, &mut Value) {
    move |_, endpoint| {
        endpoint["conditions"] =
            json!({"ready": ready, "serving": serving, "terminating": terminating});
    }
}

/// "should create endpoints for unready pods", "should be able to connect to terminating and
/// unready endpoints if PublishNotReadyAddresses is true" and "should not be able to connect to
/// terminating and unready endpoints if PublishNotReadyAddresses is false", with their NodePorts. Limit: 5 min (`KubeProxyLagTimeout`) and 30 s.
#[test]
fn follows_the_conditions_of_unready_endpoints() -> TestResult {
    let (cluster, outside) = Outside::start(Cluster::builder("unready"))?;
    let backends = Backends::start(&cluster, "webserver", &["node1"])?;
    let clients = [
        cluster.pod("node1", "pause1")?,
        cluster.pod("node2", "pause2")?,
    ];
    let vips = cluster_ips(10);
    backends.serve(&cluster, "tolerate-unready", &vips, |service| {
        service["spec"]["type"] = "NodePort".into();
        for port in 0..2 {
            service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
        }
    })?;
    // (conditions, served): with publishNotReadyAddresses the controller says ready.
    let cases = [
        ((false, false, false), false),
        ((true, false, false), true),
        ((true, false, true), true),
        ((false, false, true), false),
        ((true, true, true), true),
    ];
    for ((ready, serving, terminating), served) in cases {
        let conditions = conditions(ready, serving, terminating);
        apply_slices(
            &cluster,
            "tolerate-unready",
            &backends.endpoints(),
            conditions,
        )?;
        for client in &clients {
            if served {
                is_up(&client.netns, &vips, &backends.names())?;
            } else {
                is_down(&client.netns, &vips)?;
            }
        }
        for address in cluster.nodes().iter().flat_map(|node| &node.addresses) {
            let to = SocketAddr::new(*address, NODE_PORT);
            for client in [&clients[0].netns, &outside.client] {
                for protocol in Protocol::ALL {
                    if served {
                        is_served_by(client, protocol, to, &backends.names())?;
                    } else {
                        is_refused(client, protocol, to)?;
                    }
                }
            }
        }
    }
    Ok(())
}

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

/// "should fallback to local terminating endpoints when there are no ready endpoints with
/// internalTrafficPolicy=Local". Limit: five times in 25 s.
#[test]
fn falls_back_to_local_terminating_endpoints() -> TestResult {
    let cluster = Cluster::builder("terminating local").start()?;
    let backends = Backends::start(&cluster, "echo-hostname-", &["node1"])?;
    let near = cluster.pod("node1", "pause1")?;
    let far = cluster.pod("node2", "pause2")?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "svc-proxy-terminating", &vips, |service| {
        service["spec"]["internalTrafficPolicy"] = "Local".into();
    })?;
    apply_slices(
        &cluster,
        "svc-proxy-terminating",
        &backends.endpoints(),
        |_, endpoint| terminating(endpoint),
    )?;
    is_up(&near.netns, &vips, &backends.names())?;
    // Upstream leaves open how it fails.
    Ok(is_down(&far.netns, &vips)?)
}

/// "should fallback to terminating endpoints when there are no ready endpoints with
/// externallTrafficPolicy=Cluster" and "should fallback to local terminating endpoints when there
/// are no ready endpoints with externalTrafficPolicy=Local", as clients of the node itself see
/// them, to whom every endpoint is inside; from outside it is
/// `external_policy::falls_back_to_terminating_endpoints`. Limit: five times
/// in 25 s.
#[test]
fn falls_back_to_terminating_endpoints_of_a_node_port() -> TestResult {
    let cluster = Cluster::builder("terminating node port").start()?;
    let backends = Backends::start(&cluster, "echo-hostname-", &["node1"])?;
    let client = cluster.pod("node1", "pause1")?;
    let far = cluster.pod("node2", "pause2")?;
    let vips = cluster_ips(10);
    for policy in ["Cluster", "Local"] {
        backends.serve(&cluster, "svc-proxy-terminating", &vips, |service| {
            service["spec"]["type"] = "NodePort".into();
            service["spec"]["externalTrafficPolicy"] = policy.into();
            for port in 0..2 {
                service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
            }
        })?;
        apply_slices(
            &cluster,
            "svc-proxy-terminating",
            &backends.endpoints(),
            |_, endpoint| terminating(endpoint),
        )?;
        for address in &cluster.node("node1").addresses {
            for protocol in Protocol::ALL {
                let to = SocketAddr::new(*address, NODE_PORT);
                is_served_by(&client.netns, protocol, to, &backends.names())?;
            }
        }
        // A node without endpoints: to clients inside, all count as with Cluster.
        let node = cluster.node("node2");
        for from in [&far.netns, &*node.netns] {
            for address in &node.addresses {
                for protocol in Protocol::ALL {
                    let to = SocketAddr::new(*address, NODE_PORT);
                    is_served_by(from, protocol, to, &backends.names())?;
                }
            }
        }
    }
    Ok(())
}
