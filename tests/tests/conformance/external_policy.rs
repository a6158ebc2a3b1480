//! External traffic policies as clients beyond the nodes see them: upstream's 'ESIPP' cases in
//! `test/e2e/network/loadbalancer.go`, and its fall-back to terminating endpoints. Health check node ports are not asked
//! here.

use weir_tests::{
    TestResult,
    cluster::cluster_ips,
    traffic::{self, Protocol},
    witness,
};

use super::{
    beyond::{Bed, SERVICE, at, ingress, load_balancer, node_port, node_ports},
    support::{Backends, PORT, apply_slices, is_up, terminating},
};

/// "should work for type=LoadBalancer [Slow]": the endpoint sees the client's address. Limit: 15 min for the cloud.
#[test]
fn local_policy_keeps_the_client_of_a_load_balancer() -> TestResult {
    let bed = Bed::start("ESIPP LB", 2)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1", "node2"])?;
    backends.serve(
        &bed.cluster,
        SERVICE,
        &cluster_ips(10),
        load_balancer("Local")?,
    )?;
    let to = at(&ingress()?, PORT);
    bed.is_local(&to, &["pod1"])?;
    bed.lead_to("node2")?;
    Ok(bed.is_local(&to, &["pod2"])?)
}

/// "should work for type=NodePort": nodes with endpoints serve, and the endpoint sees the client's address. Limit:
/// lag.
#[test]
fn local_policy_keeps_the_client_of_a_node_port() -> TestResult {
    let bed = Bed::start("ESIPP NodePort", 3)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1", "node2"])?;
    backends.serve(&bed.cluster, SERVICE, &cluster_ips(10), |service| {
        node_port(service);
        service["spec"]["externalTrafficPolicy"] = "Local".into();
    })?;
    bed.is_local(&node_ports(bed.cluster.node("node1")), &["pod1"])?;
    bed.is_local(&node_ports(bed.cluster.node("node2")), &["pod2"])?;
    Ok(bed.is_refused(&node_ports(bed.cluster.node("node3")))?)
}

/// "should only target nodes with endpoints [Slow]" (newer: "should target all nodes with endpoints"): the endpoint
/// moves from node to node. Limit: lag.
#[test]
fn only_nodes_with_endpoints_serve() -> TestResult {
    let bed = Bed::start("ESIPP nodes", 3)?;
    let on = ["node1", "node2", "node3"];
    let backends = Backends::start(&bed.cluster, "pod", &on)?;
    let vips = cluster_ips(10);
    backends.serve(&bed.cluster, SERVICE, &vips, load_balancer("Local")?)?;
    let to = at(&ingress()?, PORT);
    for (pod, with) in backends.pods.iter().zip(on) {
        apply_slices(&bed.cluster, SERVICE, &pod.endpoints(), |_, _| {})?;
        for node in on {
            bed.lead_to(node)?;
            let ports = node_ports(bed.cluster.node(node));
            if node == with {
                bed.is_local(&to, &[&pod.name])?;
                bed.is_local(&ports, &[&pod.name])?;
            } else {
                bed.is_refused(&to)?;
                bed.is_refused(&ports)?;
            }
        }
    }
    Ok(())
}

/// "should work from pods [Slow]": a pod on a node without endpoints reaches the load balancer's address, and the
/// endpoint sees the pod. Limit: lag.
#[test]
fn pods_reach_a_load_balancer_with_local_policy() -> TestResult {
    let bed = Bed::start("ESIPP pods", 2)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1"])?;
    backends.serve(
        &bed.cluster,
        SERVICE,
        &cluster_ips(10),
        load_balancer("Local")?,
    )?;
    for node in ["node1", "node2"] {
        let client = bed.cluster.pod(node, &format!("pause-{node}"))?;
        is_up(&client.netns, &ingress()?, &backends.names())?;
        for to in at(&ingress()?, PORT) {
            for protocol in Protocol::ALL {
                let seen = client.run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
                assert_eq!(seen.client.ip(), client.address(to.is_ipv6())?);
            }
        }
    }
    Ok(())
}

/// "should handle updates to ExternalTrafficPolicy field [Slow]", and the outside of "should implement NodePort and
/// HealthCheckNodePort correctly when ExternalTrafficPolicy changes". Limit: lag.
#[test]
fn follows_changes_of_the_traffic_policy() -> TestResult {
    let bed = Bed::start("ESIPP updates", 3)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    let to = at(&ingress()?, PORT);
    for policy in ["Local", "Cluster", "Local"] {
        backends.serve(&bed.cluster, SERVICE, &vips, load_balancer(policy)?)?;
        for node in bed.cluster.nodes() {
            bed.lead_to(&node.name)?;
            let here = match &*node.name {
                "node1" => Some("pod1"),
                "node2" => Some("pod2"),
                _ => None,
            };
            let frontends = [to.clone(), node_ports(node)].concat();
            match (policy, here) {
                ("Local", Some(pod)) => bed.is_local(&frontends, &[pod])?,
                ("Local", None) => bed.is_refused(&frontends)?,
                _ => {
                    bed.is_served(&frontends, &backends.names())?;
                    for to in frontends {
                        for protocol in Protocol::ALL {
                            let seen = bed.ask(protocol, to)?;
                            if Some(&*seen.server) == here {
                                assert_eq!(seen.client, seen.own);
                            } else {
                                assert_eq!(seen.client.ip(), node.address(to.is_ipv6())?);
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// "should fallback to terminating endpoints when there are no ready endpoints with externallTrafficPolicy=Cluster" and
/// "should fallback to local terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Local"
/// of `service.go`, from outside. Limit: five times in 25 s.
#[test]
fn falls_back_to_terminating_endpoints() -> TestResult {
    let bed = Bed::start("terminating outside", 2)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    let [first, second] = [0, 1].map(|number| node_ports(&bed.cluster.nodes()[number]));
    let to = at(&ingress()?, PORT);

    backends.serve(&bed.cluster, SERVICE, &vips, load_balancer("Local")?)?;
    // All of node1 terminate, node2 has a ready one: each node has its own.
    let endpoints = backends.endpoints();
    apply_slices(&bed.cluster, SERVICE, &endpoints, |number, endpoint| {
        if number == 0 {
            terminating(endpoint);
        }
    })?;
    bed.is_local(&[to.clone(), first.clone()].concat(), &["pod1"])?;
    bed.is_local(&second, &["pod2"])?;
    // One alone, and it terminates.
    let alone = backends.pods[0].endpoints();
    apply_slices(&bed.cluster, SERVICE, &alone, |_, endpoint| {
        terminating(endpoint);
    })?;
    bed.is_local(&[to.clone(), first.clone()].concat(), &["pod1"])?;
    bed.is_refused(&second)?;

    backends.serve(&bed.cluster, SERVICE, &vips, load_balancer("Cluster")?)?;
    apply_slices(&bed.cluster, SERVICE, &alone, |_, endpoint| {
        terminating(endpoint);
    })?;
    for frontends in [&to, &first, &second] {
        bed.is_served(frontends, &["pod1"])?;
    }
    // While one is ready, the terminating one gets nothing new.
    apply_slices(&bed.cluster, SERVICE, &endpoints, |number, endpoint| {
        if number == 0 {
            terminating(endpoint);
        }
    })?;
    for frontends in [&to, &first, &second] {
        bed.is_served(frontends, &["pod2"])?;
    }
    Ok(())
}
