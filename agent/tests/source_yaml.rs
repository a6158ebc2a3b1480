//! Manifests as text: what is read, with which defaults, and what is said about mistakes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::IpAddr;

use weir_agent::{
    objects::{Family, Hints, Object, Protocol, ServiceType, TrafficPolicy},
    source::yaml::{self, Format, Manifest},
};

fn parse(text: &str) -> Manifest {
    yaml::parse(text, Format::Yaml)
}

fn keys(manifest: &Manifest) -> Vec<String> {
    let objects = manifest.objects.iter();
    objects
        .map(|o| format!("{}:{}", o.line, o.object.key()))
        .collect()
}

fn errors(manifest: &Manifest) -> Vec<String> {
    manifest.errors.iter().map(ToString::to_string).collect()
}

/// The one object of a text.
fn object(text: &str) -> Object {
    let mut manifest = parse(text);
    assert_eq!(errors(&manifest), [] as [String; 0]);
    assert_eq!(manifest.objects.len(), 1);
    manifest.objects.remove(0).object
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn documents_lists_and_what_is_ignored() {
    let manifest = parse(
        "\u{feff}# a comment
%YAML 1.1
---
apiVersion: v1
kind: Namespace
metadata: {name: one}
...
--- # nothing here
---
apiVersion: v1
kind: List
metadata: {resourceVersion: ''}
items:
- apiVersion: v1
  kind: Service
  metadata: {name: a, namespace: shop, unknown: 1}
  spec: {clusterIP: 10.96.0.1, unknown: {deep: [1]}}
- apiVersion: v1
  kind: ConfigMap
  metadata: {name: c}
  data:
    text: |
      ---
      {
---
kind: PodList
apiVersion: v1
items:
- metadata: {name: p}
---
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: other}
---
apiVersion: example.com/v1
kind: Basket
items: [apple, 5]
--- {apiVersion: v1, kind: Node, metadata: {name: n}}
",
    );
    assert_eq!(errors(&manifest), [] as [String; 0]);
    assert_eq!(
        keys(&manifest),
        [
            "4:Namespace one",
            "10:Service shop/a",
            "26:Pod default/p",
            "38:Node n"
        ]
    );
    assert_eq!(
        manifest.ignored,
        [
            "v1 ConfigMap",
            "serving.knative.dev/v1 Service",
            "example.com/v1 Basket"
        ]
    );
}

#[test]
fn json_values_follow_each_other() {
    let text = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"\ud83d\ude00"}}

{"apiVersion":"v1","kind":"Node",
 "metadata":{"name":7}}
{"apiVersion":"v1","kind":"NodeList","items":[{"metadata":{"name":"n"}}]}
{"apiVersion":"v1","kind":"Node",
 "metadata":{"name":"lost""#;
    let manifest = yaml::parse(text, Format::Json);
    assert_eq!(keys(&manifest), ["1:Namespace 😀", "5:Node n"]);
    assert_eq!(
        errors(&manifest),
        [
            "line 4: invalid type: integer `7`, expected a string",
            "line 7: EOF while parsing an object",
        ]
    );
}

#[test]
fn a_service_and_its_defaults() {
    let Object::Service(service) = object(
        "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {clusterIPs: [10.96.0.1, 'fd96::1'], \
         ports: [{port: 80}, {name: dns, port: 53, protocol: UDP, nodePort: 30053}]}}",
    ) else {
        panic!()
    };
    assert_eq!(service.name.to_string(), "default/a");
    assert_eq!(service.created, None);
    assert_eq!(service.service_type, ServiceType::ClusterIp);
    assert_eq!(
        service.cluster_ips,
        [address("10.96.0.1"), address("fd96::1")]
    );
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|p| (p.protocol, p.node_port))
        .collect();
    assert_eq!(ports, [(Protocol::Tcp, 0), (Protocol::Udp, 30053)]);
    for (spec, expected) in [
        ("{clusterIP: None}", vec![]),
        ("{clusterIP: None, clusterIPs: [None]}", vec![]),
        ("{clusterIP: ''}", vec![]),
        (
            "{clusterIP: 10.96.0.1, clusterIPs: []}",
            vec![address("10.96.0.1")],
        ),
        ("{clusterIP: 10.96.0.1, type: ExternalName}", vec![]),
        ("null", vec![]),
    ] {
        let text =
            format!("{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {spec}}}");
        let Object::Service(service) = object(&text) else {
            panic!()
        };
        assert_eq!(service.cluster_ips, expected, "{spec}");
    }
    let Object::Service(service) = object(
        "{apiVersion: v1, kind: Service, metadata: {name: a, creationTimestamp: 1970-01-02T00:00:05Z}}",
    ) else {
        panic!()
    };
    assert_eq!(service.created, Some(86_405));
}

#[test]
fn what_a_service_says_of_the_outside() {
    let service = |spec: &str, status: &str| {
        let text = format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {spec}, status: {status}}}"
        );
        match object(&text) {
            Object::Service(service) => service,
            other => panic!("{other:?}"),
        }
    };
    let plain = service("{clusterIP: 10.96.0.1}", "{}");
    assert!(plain.external_ips.is_empty());
    assert!(plain.load_balancer_ips.is_empty());
    let policies = (plain.internal_policy, plain.external_policy);
    assert_eq!(policies, (TrafficPolicy::Cluster, TrafficPolicy::Cluster));
    assert_eq!(plain.affinity, None);

    let full = service(
        "{externalIPs: [192.0.2.1, '2001:db8::1'], internalTrafficPolicy: Local,
          externalTrafficPolicy: Cluster, sessionAffinity: ClientIP}",
        "{loadBalancer: {ingress: [{ip: 192.0.2.7}, {ip: 192.0.2.8, ipMode: VIP},
          {ip: 192.0.2.9, ipMode: Proxy}, {hostname: x.example}, {ip: '2001:db8::7'}]}}",
    );
    assert_eq!(
        full.external_ips,
        [address("192.0.2.1"), address("2001:db8::1")]
    );
    let vips = ["192.0.2.7", "192.0.2.8", "2001:db8::7"].map(address);
    assert_eq!(full.load_balancer_ips, vips);
    let policies = (full.internal_policy, full.external_policy);
    assert_eq!(policies, (TrafficPolicy::Local, TrafficPolicy::Cluster));
    assert_eq!(full.affinity, Some(10_800));
    for (seconds, expected) in [("1", 1), ("86400", 86_400)] {
        let config = format!("{{clientIP: {{timeoutSeconds: {seconds}}}}}");
        let spec = format!("{{sessionAffinity: ClientIP, sessionAffinityConfig: {config}}}");
        assert_eq!(service(&spec, "{}").affinity, Some(expected));
        let spec = format!("{{sessionAffinity: None, sessionAffinityConfig: {config}}}");
        assert_eq!(service(&spec, "{}").affinity, None);
    }
}

#[test]
fn hints_of_an_endpoint() {
    let Object::EndpointSlice(slice) = object(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s}
addressType: IPv4
endpoints:
- {addresses: [10.0.0.1], hints: {forZones: [{name: a}, {name: b}], forNodes: [{name: n}]}}
- {addresses: [10.0.0.2], hints: {}}
- {addresses: [10.0.0.3], hints: {forZones: []}}
- {addresses: [10.0.0.4]}
",
    ) else {
        panic!()
    };
    let hints = Hints {
        nodes: vec!["n".to_owned()],
        zones: vec!["a".to_owned(), "b".to_owned()],
    };
    let found: Vec<_> = slice.endpoints.into_iter().map(|e| e.hints).collect();
    assert_eq!(found, [Some(Box::new(hints)), None, None, None]);
}

#[test]
fn a_slice_and_its_defaults() {
    let Object::EndpointSlice(slice) = object(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
endpoints:
- {addresses: ['fd00::1', 'fd00::2'], nodeName: n, zone: z, targetRef: {name: p}}
- {addresses: ['fd00::3'], conditions: {ready: false}}
- {addresses: ['fd00::4'], conditions: {ready: false, serving: true, terminating: true}}
- {addresses: [10.0.0.1]}
ports: [{port: 8080}, {name: none}, {name: dns, port: 53, protocol: UDP}]
",
    ) else {
        panic!()
    };
    assert_eq!(
        (slice.service.as_str(), slice.family),
        ("web", Some(Family::V6))
    );
    let [first, second, third, fourth] = &slice.endpoints[..] else {
        panic!()
    };
    assert_eq!(first.address, Some(address("fd00::1")));
    assert_eq!(
        (first.ready, first.serving, first.terminating),
        (true, true, false)
    );
    assert_eq!(
        (
            first.node.as_str(),
            first.zone.as_str(),
            first.target.as_str()
        ),
        ("n", "z", "shop/p")
    );
    assert_eq!(
        (second.ready, second.serving, second.terminating),
        (false, true, false)
    );
    assert_eq!(
        (third.ready, third.serving, third.terminating),
        (false, true, true)
    );
    assert_eq!(fourth.address, None);
    let ports: Vec<_> = slice
        .ports
        .iter()
        .map(|p| (p.name.as_str(), p.port, p.protocol))
        .collect();
    assert_eq!(
        ports,
        [("", 8080, Protocol::Tcp), ("dns", 53, Protocol::Udp)]
    );
}

#[test]
fn a_node_and_pods() {
    let Object::Node(node) = object(
        "{apiVersion: v1, kind: Node, metadata: {name: n}, spec: {podCIDR: 10.1.0.0/16, podCIDRs: [10.2.3.4/24]},
          status: {addresses: [{type: ExternalIP, address: '2001:db8::1'}, {type: InternalIP, address: 192.0.2.1},
          {type: Hostname, address: n}]}}",
    ) else {
        panic!()
    };
    assert_eq!(node.internal_ips, [address("192.0.2.1")]);
    assert_eq!(node.external_ips, [address("2001:db8::1")]);
    assert_eq!(node.pod_cidrs, ["10.2.3.0/24".parse().unwrap()]);
    for (rest, ips) in [
        (
            "spec: {nodeName: n}, status: {podIP: 10.1.0.1}",
            vec![address("10.1.0.1")],
        ),
        (
            "status: {podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}, {ip: 'fd00::1'}]}",
            vec![address("10.1.0.1"), address("fd00::1")],
        ),
        ("status: {phase: Succeeded, podIP: 10.1.0.1}", vec![]),
        ("status: {phase: Failed, podIPs: [{ip: 10.1.0.1}]}", vec![]),
        ("status: {phase: Pending}", vec![]),
    ] {
        let text = format!("{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, {rest}}}");
        let Object::Pod(pod) = object(&text) else {
            panic!()
        };
        assert_eq!(pod.ips, ips, "{rest}");
    }
}

#[test]
fn values_that_are_refused() {
    let service = "apiVersion: v1, kind: Service, metadata: {name: a}";
    let slice = "apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s}";
    let node = "apiVersion: v1, kind: Node, metadata: {name: n}";
    let cases = [
        (
            service,
            "spec: {type: Cluster}",
            "Service default/a: spec.type: \"Cluster\" is not one of",
        ),
        (
            service,
            "spec: {externalTrafficPolicy: local}",
            "spec.externalTrafficPolicy: \"local\" is not one of Cluster, Local",
        ),
        (
            service,
            "spec: {internalTrafficPolicy: Node}",
            "spec.internalTrafficPolicy: \"Node\" is not one of Cluster, Local",
        ),
        (
            service,
            "spec: {sessionAffinity: Cookie}",
            "spec.sessionAffinity: \"Cookie\" is not one of None, ClientIP",
        ),
        (
            service,
            "spec: {sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}}",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: \"0\" is not a time that affinity \
             can last: 1 to 86400 seconds",
        ),
        (
            service,
            "spec: {sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}}",
            "timeoutSeconds: \"86401\" is not a time",
        ),
        (
            service,
            "spec: {externalIPs: [192.0.2.1, 127.0.0.1]}",
            "spec.externalIPs[1]: \"127.0.0.1\" is a loopback,",
        ),
        (
            service,
            "status: {loadBalancer: {ingress: [{ip: x}]}}",
            "status.loadBalancer.ingress[0].ip: \"x\" is not an IP address",
        ),
        (
            service,
            "status: {loadBalancer: {ingress: [{ip: 192.0.2.1, ipMode: DSR}]}}",
            "status.loadBalancer.ingress[0].ipMode: \"DSR\" is not one of VIP, Proxy",
        ),
        (
            service,
            "spec: {clusterIP: 10.96.0}",
            "spec.clusterIPs[0]: \"10.96.0\" is not an IP address",
        ),
        (
            service,
            "spec: {clusterIPs: [10.96.0.1, None]}",
            "spec.clusterIPs[1]: \"None\" is not an IP",
        ),
        (
            service,
            "spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.2]}",
            "spec.clusterIP: \"10.96.0.1\" differs from spec.clusterIPs[0]",
        ),
        (
            service,
            "spec: {clusterIP: '::ffff:10.96.0.1'}",
            "write it as IPv4",
        ),
        (service, "spec: {clusterIP: 127.0.0.1}", "is a loopback,"),
        (
            service,
            "spec: {clusterIP: 0.0.0.0}",
            "is the unspecified address",
        ),
        (
            service,
            "spec: {ports: [{port: 80}, {port: 0}]}",
            "spec.ports[1].port: \"0\" is not a port",
        ),
        (
            service,
            "spec: {ports: [{port: 65536}]}",
            "spec.ports[0].port: \"65536\" is not a port: 1 to 65535",
        ),
        (
            service,
            "spec: {ports: [{port: 1, nodePort: -1}]}",
            "spec.ports[0].nodePort: \"-1\"",
        ),
        (
            service,
            "spec: {ports: [{port: 1, protocol: tcp}]}",
            "spec.ports[0].protocol: \"tcp\" is not one of",
        ),
        (
            service,
            "spec: {ports: [{port: http}]}",
            "Service default/a: spec.ports[0].port: invalid type",
        ),
        (
            slice,
            "addressType: ipv4",
            "EndpointSlice default/s: addressType: \"ipv4\"",
        ),
        (
            slice,
            "addressType: IPv4, endpoints: [{addresses: []}]",
            "endpoints[0].addresses[0]: \"\" is missing",
        ),
        (
            slice,
            "addressType: IPv4, endpoints: [{addresses: [a.b]}]",
            "endpoints[0].addresses[0]: \"a.b\" is not",
        ),
        (
            slice,
            "addressType: IPv6, endpoints: [{addresses: ['fe80::1']}]",
            "link-local",
        ),
        (
            slice,
            "addressType: IPv4, ports: [{port: 70000}]",
            "ports[0].port: \"70000\" is not a port",
        ),
        (
            node,
            "spec: {podCIDRs: [10.0.0.0]}",
            "Node n: spec.podCIDRs[0]: \"10.0.0.0\" is not a CIDR",
        ),
        (
            node,
            "status: {addresses: [{type: InternalIP, address: me}]}",
            "status.addresses[0].address: \"me\" is not an IP address",
        ),
        (
            "apiVersion: v1, kind: Pod",
            "spec: {}",
            "metadata.name: \"\" must not be empty",
        ),
        (
            "apiVersion: v1",
            "metadata: {name: a}",
            "the field `kind` is missing",
        ),
        (
            "kind: Pod",
            "metadata: {name: a}",
            "the field `apiVersion` is missing",
        ),
        (
            "apiVersion: discovery.k8s.io/v1beta1",
            "kind: EndpointSlice",
            "apiVersion \"discovery.k8s.io/v1beta1\" is not known; write discovery.k8s.io/v1",
        ),
    ];
    for (head, rest, expected) in cases {
        let manifest = parse(&format!("# first\n---\n\n{{{head}, {rest}}}\n"));
        assert!(manifest.objects.is_empty(), "{rest}");
        let errors = errors(&manifest);
        assert_eq!(errors.len(), 1, "{rest}");
        assert!(errors[0].starts_with("line 4: "), "{errors:?}");
        assert!(errors[0].contains(expected), "{errors:?}\n{expected}");
    }
    assert_eq!(
        errors(&parse("just text"))[0].split_once(':').unwrap().0,
        "line 1"
    );
}

#[test]
fn a_mistake_costs_its_own_document_only() {
    let manifest = parse(
        "apiVersion: v1
kind: Namespace
metadata: {name: one}
---
apiVersion: v1
kind: Namespace
  metadata: {name: two}
---
apiVersion: v1
kind: Service
metadata: {name: three}
spec:
  ports:
  - port: 80
    name: [x]
---
apiVersion: v1
kind: Namespace
metadata: {name: four}
",
    );
    assert_eq!(keys(&manifest), ["1:Namespace one", "17:Namespace four"]);
    let errors = errors(&manifest);
    assert_eq!(errors.len(), 2);
    assert!(
        errors[0].starts_with("line 7: mapping values are not allowed"),
        "{errors:?}"
    );
    assert!(
        errors[1].starts_with("line 15: Service default/three: spec.ports[0]"),
        "{errors:?}"
    );
    assert_eq!(manifest.errors[0].object, None);
    assert_eq!(
        manifest.errors[1].object.as_ref().unwrap().to_string(),
        "Service default/three"
    );
}

#[test]
fn a_mistake_costs_its_own_item_of_a_list_only() {
    let mut text = "kind: ServiceList\napiVersion: v1\nitems:\n".to_owned();
    for index in 0..30 {
        let port = match index {
            3 => "{}",
            4 => "99999",
            _ => "80",
        };
        text += &format!("- metadata: {{name: s{index}}}\n  spec: {{ports: [{{port: {port}}}]}}\n");
    }
    let manifest = parse(&text);
    assert_eq!(manifest.objects.len(), 28);
    let errors = errors(&manifest);
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(
        errors[0].starts_with("line 11: Service default/s3: items[3].spec"),
        "{errors:?}"
    );
    assert!(
        errors[1].starts_with("line 1: Service default/s4: spec.ports[0].port"),
        "{errors:?}"
    );
    // Too many: what follows is not looked at, and that is said.
    let manifest = parse(&text.replace("port: 80", "port: {}"));
    let (known, unknown): (Vec<_>, Vec<_>) =
        manifest.errors.iter().partition(|e| e.object.is_some());
    assert_eq!((known.len(), unknown.len()), (17, 1));
    assert!(
        unknown[0]
            .cause
            .contains("items[17] and later are not read"),
        "{unknown:?}"
    );
    assert_eq!(manifest.objects, []);
}

#[test]
fn any_text_comes_to_an_end() {
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - {port: 80, name: \"x\"}\n---\n";
    let noise = [
        "---", "...", "\t", "{", "[", "\"", "'", "&a", "*a", "!x", "%", "|", ": ", "- ", "\0",
    ];
    for cut in 0..text.len() {
        for noise in noise {
            let broken = format!("{}{noise}{}", &text[..cut], &text[cut..]);
            yaml::parse(&broken, Format::Yaml);
            yaml::parse(&broken, Format::Json);
        }
    }
}

#[test]
fn a_document_that_is_nested_too_deep_is_refused_at_once() {
    let deep = 100_000;
    let nested = [
        format!("a: {}", "[".repeat(deep)),
        format!("{{{}", "a: {".repeat(deep)),
        format!("text: it's\n  [\nb:\n{}", "[".repeat(deep)),
        format!("text: |\n [\nc: {}", "[".repeat(deep)),
        format!("a: 1 # c\u{85}{}", "[".repeat(deep)),
        format!("%YAML 1.1\n---\u{2028}{}", "[".repeat(deep)),
        format!("text\n...\u{85}{}", "[".repeat(deep)),
        format!("!t &a {}", "[\n".repeat(deep)),
        format!("a: ['x''[', \"\\\"]\", y, {}", "[".repeat(deep)),
        "- ".repeat(deep),
        (0..200).map(|i| " ".repeat(i) + "a:\n").collect(),
    ];
    for text in nested {
        let start = std::time::Instant::now();
        let manifest = parse(
            &("kind: Namespace\napiVersion: v1\nmetadata: {name: one}\n---\n".to_owned() + &text),
        );
        let shown: String = text.chars().take(20).collect();
        assert!(start.elapsed().as_secs() < 5, "{shown}");
        assert_eq!(keys(&manifest), ["1:Namespace one"], "{shown}");
        let errors = errors(&manifest);
        assert_eq!(errors.len(), 1, "{shown}");
        assert!(
            errors[0].contains(": nested deeper than 128 levels; correct"),
            "{errors:?}"
        );
    }
    let line = parse(&format!("a: 1\nb: [\n{}", "[\n".repeat(deep))).errors[0].line;
    assert_eq!(line, 129);
}

#[test]
fn brackets_that_do_not_nest_are_not_counted() {
    let many = "[[{".repeat(100);
    let lines = "    [[ -n x && {\n".repeat(200);
    let flow = format!("{}{}", "[".repeat(100), "]".repeat(100));
    for data in [
        format!("text: |\n{lines}"),
        format!("text: >-\n\n{lines}\n  other: |2 # {many}\n{lines}"),
        format!("? text\n  : |\n{lines}"),
        format!("text:\n    |\n{lines}"),
        format!("text: x{many}\n    {many}\n    {many}"),
        format!("text: '{many} '' {many}\n    {many}'\n  other: \"\\\"{many}\""),
        format!("text: 1 # {many}\n  # {many}\n  other: [it's, {{a: 'x{many}'}}, a, {flow}]"),
        format!("\"q: [\": {flow}\n  é: {flow}\n  {{a: 1}}: |\n{lines}"),
        format!(
            "text: &a !t {flow}\n  list:\n{}",
            "  - - a: [b]\n      c: {}\n".repeat(300)
        ),
    ] {
        let text = format!(
            "kind: ConfigMap\napiVersion: v1\nmetadata: {{name: c}}\ndata:\n  {data}\n---\nkind: Namespace\napiVersion: v1\nmetadata: {{name: one}}\n"
        );
        for text in [text.replace('\n', "\r\n"), text] {
            let manifest = parse(&text);
            assert_eq!(errors(&manifest), [] as [String; 0], "{data}");
            assert_eq!(manifest.objects.len(), 1, "{data}");
        }
    }
    let values = r#"{"a":["[[[","\"{{{"],"b":{"c":[]}},"#.repeat(1000);
    let json = format!(
        r#"{{"kind":"Namespace","apiVersion":"v1","metadata":{{"name":"one"}},"x":[{values}0]}}"#
    );
    assert_eq!(parse(&json).objects.len(), 1);
}
