//! What load balancers ask a node: `healthCheckNodePort` of Services, and `/healthz`. Asked from
//! another node, by both families.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Families, Node, TestResult,
    cluster::cluster_ips,
    held::Held,
    http::{self, Answer},
    objects::{self, Endpoint, Port},
    traffic::{self, Protocol},
    wait_until,
};

const CHECK_PORT: u16 = 31_000;
const HEALTHZ_PORT: u16 = 10_256;
const PORT: u16 = 80;
const TARGET: u16 = 8080;
/// Health checks are served by another thread than changes objects: they follow a moment later. A port
/// in use is tried again every 30 s.
const TIMEOUT: Duration = Duration::from_secs(45);

/// A Service with a health check, and a change of it.
fn service(change: impl FnOnce(&mut Value)) -> Value {
    let mut service = objects::service("web", &cluster_ips(10), &Port::both(PORT, TARGET));
    service["spec"]["type"] = "LoadBalancer".into();
    service["spec"]["externalTrafficPolicy"] = "Local".into();
    service["spec"]["healthCheckNodePort"] = CHECK_PORT.into();
    change(&mut service);
    service
}

/// Endpoints that nobody has to serve, `count` of each family.
fn endpoints(node: &str, count: u8) -> Vec<Endpoint> {
    let number = node.trim_start_matches("node");
    let addresses = (2..2 + count).flat_map(|host| {
        [
            format!("10.244.{number}.{host}"),
            format!("fd00:244:0:{number}::{host}"),
        ]
    });
    addresses
        .filter_map(|address| address.parse::<IpAddr>().ok())
        .map(|address| Endpoint::ready(address, node, ""))
        .collect()
}

fn terminating(mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
    for endpoint in &mut endpoints {
        (endpoint.ready, endpoint.terminating) = (false, true);
    }
    endpoints
}

/// Asks every address of a node, from another one.
fn ask(cluster: &Cluster, node: &str, port: u16, path: &str) -> Result<Vec<Option<Answer>>> {
    let from = if node == "node1" { "node2" } else { "node1" };
    let from = &cluster.node(from).netns;
    let addresses = cluster.node(node).addresses.iter();
    addresses
        .map(
            |address| match http::get(from, SocketAddr::new(*address, port), path)? {
                Ok(answer) => Ok(Some(answer)),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(None),
                Err(error) => Err(error).context("neither an answer nor a refusal"),
            },
        )
        .collect()
}

/// Waits until every address of a node answers so; `None`: refuses.
fn wait_for_status(
    cluster: &Cluster,
    node: &str,
    (port, path): (u16, &str),
    wanted: Option<u16>,
) -> Result<Vec<Option<Answer>>> {
    let mut answers = Vec::new();
    let what = format!("{wanted:?} from {node}:{port}{path}");
    let waited = wait_until(&what, TIMEOUT, || {
        answers = ask(cluster, node, port, path)?;
        Ok(answers
            .iter()
            .all(|answer| answer.as_ref().map(|answer| answer.status) == wanted))
    });
    waited.with_context(|| format!("last: {answers:?}"))?;
    Ok(answers)
}

/// Waits for a count on every address of a node, and checks the answers in full.
fn wait_for_count(cluster: &Cluster, node: &str, port: u16, count: usize) -> Result<()> {
    let status = if count > 0 { 200 } else { 503 };
    wait_until(&format!("{count} from {node}"), TIMEOUT, || {
        let answers = wait_for_status(cluster, node, (port, "/any/path"), Some(status))?;
        let mut bodies = answers.iter().flatten().map(|answer| &answer.body);
        Ok(bodies.all(|body| body["localEndpoints"] == count))
    })?;
    let weight = count.to_string();
    for answer in ask(cluster, node, port, "/")?.iter().flatten() {
        let header = |name: &str| answer.headers.get(name).map(String::as_str);
        ensure!(
            header("content-type") == Some("application/json")
                && header("x-content-type-options") == Some("nosniff")
                && header("x-load-balancing-endpoint-weight") == Some(&weight),
            "{answer:?}"
        );
        let wanted = json!({
            "service": {"namespace": "default", "name": "web"},
            "localEndpoints": count,
            "serviceProxyHealthy": true,
        });
        ensure!(answer.body == wanted, "{answer:?}");
    }
    Ok(())
}

fn problems(node: &Node) -> Result<Vec<String>> {
    let status = node.weir_json(&["status"])?;
    let problems = status["problems"].as_array().context("no problems")?;
    let texts = problems.iter().filter_map(|problem| problem.as_str());
    Ok(texts.map(str::to_owned).collect())
}

fn wait_for_no_problem(node: &Node) -> Result<()> {
    wait_until("no problem", TIMEOUT, || Ok(problems(node)?.is_empty()))
}

#[test]
fn a_health_check_follows_the_service_and_its_endpoints() -> TestResult {
    let cluster = Cluster::builder("health checks").start()?;
    cluster.apply(&service(|_| {}))?;
    let both = [endpoints("node1", 3), endpoints("node2", 1)].concat();
    cluster.endpoints("web", TARGET, &both)?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 3)?;
    wait_for_count(&cluster, "node2", CHECK_PORT, 1)?;
    // Gone from one node.
    cluster.endpoints("web", TARGET, &endpoints("node1", 2))?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 2)?;
    wait_for_count(&cluster, "node2", CHECK_PORT, 0)?;
    // Terminating, though they serve.
    cluster.endpoints("web", TARGET, &terminating(endpoints("node1", 2)))?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 0)?;
    cluster.endpoints("web", TARGET, &endpoints("node1", 2))?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 2)?;
    // Another port.
    const OTHER: u16 = 31_001;
    cluster.apply(&service(|s| {
        s["spec"]["healthCheckNodePort"] = OTHER.into();
    }))?;
    wait_for_count(&cluster, "node1", OTHER, 2)?;
    wait_for_status(&cluster, "node1", (CHECK_PORT, "/"), None)?;
    // None with the policy Cluster.
    cluster.apply(&service(|service| {
        service["spec"]["externalTrafficPolicy"] = "Cluster".into();
        service["spec"]["healthCheckNodePort"] = OTHER.into();
    }))?;
    wait_for_status(&cluster, "node1", (OTHER, "/"), None)?;
    cluster.apply(&service(|_| {}))?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 2)?;
    cluster.objects().delete(&service(|_| {}))?;
    wait_for_status(&cluster, "node1", (CHECK_PORT, "/"), None)?;
    wait_for_no_problem(cluster.node("node1"))?;
    Ok(())
}

/// "should fail health check node port if there are only terminating endpoints", of upstream's
/// `test/e2e/network/service.go`. Limit: 1 min.
#[test]
fn a_health_check_fails_when_only_terminating_endpoints_are_left() -> TestResult {
    let cluster = Cluster::builder("terminating health").start()?;
    let pod = cluster.pod("node1", "webserver")?;
    let _servers = pod.serve(TARGET)?;
    cluster.apply(&service(|_| {}))?;
    let is_served = || {
        cluster.node("node1").run(|| {
            for vip in cluster_ips(10) {
                let name = traffic::name(Protocol::Tcp, SocketAddr::new(vip, PORT))?;
                ensure!(name == pod.name, "{name} answered");
            }
            Ok(())
        })
    };
    cluster.endpoints("web", TARGET, &pod.endpoints())?;
    cluster.wait_applied()?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 1)?;
    wait_for_count(&cluster, "node2", CHECK_PORT, 0)?;
    is_served()?;
    cluster.endpoints("web", TARGET, &terminating(pod.endpoints()))?;
    cluster.wait_applied()?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 0)?;
    is_served()?;
    Ok(())
}

#[test]
fn a_port_in_use_is_a_problem_until_it_is_free() -> TestResult {
    let cluster = Cluster::builder("health port in use").wire()?;
    let node = cluster.node("node1");
    let listen = |port| node.run(|| TcpListener::bind(("::", port)));
    let holders = [HEALTHZ_PORT, CHECK_PORT].map(listen);
    cluster.apply(&service(|_| {}))?;
    cluster.endpoints("web", TARGET, &endpoints("node1", 1))?;
    for node in cluster.nodes() {
        node.start_agent()?;
    }
    // The agent does not mind otherwise.
    cluster.wait_applied()?;
    wait_until("problems", TIMEOUT, || {
        let problems = problems(node)?.join("\n");
        let parts = [
            "Service default/web: healthCheckNodePort 31000",
            "ss -ltnp",
            "another healthCheckNodePort",
            "/healthz",
            ":10256",
            "healthz-address",
        ];
        Ok(parts.iter().all(|part| problems.contains(part)))
    })?;
    for holder in holders {
        drop(holder.context("bind")?);
    }
    wait_for_count(&cluster, "node1", CHECK_PORT, 1)?;
    wait_for_status(&cluster, "node1", (HEALTHZ_PORT, "/healthz"), Some(200))?;
    wait_for_no_problem(node)?;
    Ok(())
}

#[test]
fn a_node_port_that_hides_a_health_check_is_named() -> TestResult {
    let cluster = Cluster::builder("hidden health checks").start()?;
    let node_port = |name: &str, number: u8, port: u16| {
        let mut service =
            objects::service(name, &cluster_ips(number), &Port::both(PORT, TARGET)[..1]);
        service["spec"]["type"] = "NodePort".into();
        service["spec"]["ports"][0]["nodePort"] = port.into();
        service
    };
    cluster.apply(&service(|_| {}))?;
    cluster.apply(&node_port("first", 11, HEALTHZ_PORT))?;
    cluster.apply(&node_port("second", 12, CHECK_PORT))?;
    cluster.wait_applied()?;
    let node = cluster.node("node1");
    let found = problems(node)?;
    let hidden = |parts: [&str; 2]| {
        let is_told = |problem: &&String| parts.iter().all(|part| problem.contains(part));
        found.iter().filter(is_told).count()
    };
    assert!(
        hidden(["/healthz", "NodePort of Service default/first"]) == 1
            && hidden([
                "healthCheckNodePort of Service default/web",
                "default/second"
            ]) == 1,
        "{found:#?}"
    );
    // Each of the Services tells of it, too.
    let told = |service: &str| {
        let output = node.agent().weir(&["service", "get", service])?;
        anyhow::Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for service in ["default/web", "default/second"] {
        let told = told(service)?;
        assert!(told.contains("cannot be asked from outside"), "{told}");
    }
    assert!(told("default/web")?.contains("healthCheckNodePort 31000"));
    assert!(!told("default/first")?.contains("default/second"));
    for (name, number) in [("first", 11), ("second", 12)] {
        cluster.apply(&node_port(name, number, 30_000 + u16::from(number)))?;
    }
    cluster.wait_applied()?;
    Ok(wait_for_no_problem(node)?)
}

/// "should check kube-proxy urls", of upstream's `test/e2e/network/networking.go`, and when it fails.
#[test]
fn healthz_says_whether_the_node_may_have_new_traffic() -> TestResult {
    const HEALTHZ: (u16, &str) = (HEALTHZ_PORT, "/healthz");
    const LIVEZ: (u16, &str) = (HEALTHZ_PORT, "/livez");
    let cluster = Cluster::builder("healthz").wire()?;
    // Without all of its objects an agent knows nothing.
    let held = Held::new(&cluster.objects().directory().join("node-node1.yaml"))?;
    for node in cluster.nodes() {
        node.start_agent()?;
    }
    for answer in wait_for_status(&cluster, "node1", HEALTHZ, Some(503))? {
        let body = answer.context("refused")?.body;
        assert!(body["nodeEligible"] == true, "{body}");
    }
    // To wait for objects is no reason to be restarted.
    wait_for_status(&cluster, "node1", LIVEZ, Some(200))?;
    assert!(held.is_wanted());
    drop(held);
    for answer in wait_for_status(&cluster, "node1", HEALTHZ, Some(200))? {
        let body = answer.context("refused")?.body;
        let times = [&body["lastUpdated"], &body["currentTime"]];
        let is_time = |time: &Value| time.as_str().is_some_and(|text| text.ends_with('Z'));
        assert!(
            times.into_iter().all(is_time) && body["nodeEligible"] == true,
            "{body}"
        );
    }
    wait_for_status(&cluster, "node1", LIVEZ, Some(200))?;
    wait_for_status(&cluster, "node1", (HEALTHZ_PORT, "/"), Some(404))?;

    let node = cluster.node("node1");
    let object = |change: fn(&mut Value)| {
        let mut object = objects::node("node1", &node.addresses, &node.pod_cidrs);
        change(&mut object);
        object
    };
    let leaving: [fn(&mut Value); 2] = [
        |node| {
            node["spec"]["taints"] =
                json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
        },
        |node| node["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into(),
    ];
    for change in leaving {
        cluster.apply(&object(change))?;
        for answer in wait_for_status(&cluster, "node1", HEALTHZ, Some(503))? {
            let body = answer.context("refused")?.body;
            assert!(body["nodeEligible"] == false, "{body}");
        }
        wait_for_status(&cluster, "node1", LIVEZ, Some(200))?;
        wait_for_status(&cluster, "node2", HEALTHZ, Some(200))?;
        cluster.apply(&object(|_| {}))?;
        wait_for_status(&cluster, "node1", HEALTHZ, Some(200))?;
    }
    Ok(())
}

#[test]
fn healthz_is_served_where_it_is_asked_for() -> TestResult {
    let cluster = Cluster::builder("healthz address").wire()?;
    let node = cluster.node("node1");
    let other = cluster.node("node2");
    for node in cluster.nodes() {
        node.agent().use_arguments(&["--healthz-address", "off"]);
        node.start_agent()?;
    }
    cluster.wait_applied()?;
    wait_for_status(&cluster, "node1", (HEALTHZ_PORT, "/healthz"), None)?;
    node.kill9_agent()?;
    let v6 = node.address(true)?;
    let address = format!("[{v6}]:9999");
    node.agent().use_arguments(&["--healthz-address", &address]);
    node.start_agent()?;
    cluster.wait_applied()?;
    wait_until("200", TIMEOUT, || {
        let answer = http::get(&other.netns, SocketAddr::new(v6, 9999), "/healthz")?;
        Ok(answer?.status == 200)
    })?;
    let v4 = SocketAddr::new(node.address(false)?, 9999);
    let refused = http::get(&other.netns, v4, "/healthz")?;
    assert!(refused.is_err(), "{refused:?}");
    Ok(())
}

#[test]
fn health_is_served_without_ipv6() -> TestResult {
    let cluster = Cluster::builder("health without IPv6")
        .families(Families::V4)
        .wire()?;
    for node in cluster.nodes() {
        node.netns.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        node.netns
            .sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    }
    cluster.apply(&service(|service| {
        for name in ["clusterIPs", "ipFamilies"] {
            let Some(list) = service["spec"][name].as_array_mut() else {
                panic!("no {name}");
            };
            list.truncate(1);
        }
    }))?;
    cluster.endpoints("web", TARGET, &endpoints("node1", 1))?;
    for node in cluster.nodes() {
        node.start_agent()?;
    }
    cluster.wait_applied()?;
    wait_for_count(&cluster, "node1", CHECK_PORT, 1)?;
    wait_for_status(&cluster, "node1", (HEALTHZ_PORT, "/healthz"), Some(200))?;
    wait_for_no_problem(cluster.node("node1"))?;
    Ok(())
}
