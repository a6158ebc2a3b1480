//! The result of ADD, in the words of each version of the specification.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::{agent::Reservation, version::Version};

/// Success of ADD. `netns` and `ifname` are the runtime's own words.
pub fn success(version: Version, reservation: &Reservation, ifname: &str, netns: &str) -> String {
    let interface = |name: &str, mac: &str, sandbox: &str| {
        let mut interface = Map::new();
        interface.insert("name".into(), name.into());
        interface.insert("mac".into(), mac.into());
        if version >= Version::V1_1_0 {
            interface.insert("mtu".into(), reservation.mtu.into());
        }
        if !sandbox.is_empty() {
            interface.insert("sandbox".into(), sandbox.into());
        }
        Value::Object(interface)
    };
    let host_mac = reservation.host_mac.to_string();
    let pod_mac = reservation.pod_mac.to_string();
    let ips: Vec<Value> = reservation
        .families
        .iter()
        .map(|family| {
            let (prefix, version_word) = match family.address {
                IpAddr::V4(_) => (32, "4"),
                IpAddr::V6(_) => (128, "6"),
            };
            let mut ip = json!({
                "address": format!("{}/{prefix}", family.address),
                "gateway": family.gateway,
                "interface": 1,
            });
            if version < Version::V1_0_0 {
                ip["version"] = version_word.into();
            }
            ip
        })
        .collect();
    let routes: Vec<Value> = reservation
        .families
        .iter()
        .map(|family| {
            let everything = match family.address {
                IpAddr::V4(_) => "0.0.0.0/0",
                IpAddr::V6(_) => "::/0",
            };
            json!({ "dst": everything, "gw": family.gateway })
        })
        .collect();
    json!({
        "cniVersion": version.as_str(),
        "interfaces": [
            interface(&reservation.host_ifname, &host_mac, ""),
            interface(ifname, &pod_mac, netns),
        ],
        "ips": ips,
        "routes": routes,
        "dns": {},
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{Family, Mac};

    fn result(version: Version) -> Value {
        let reservation = Reservation {
            host_ifname: "weir0123456789a".into(),
            host_mac: Mac([10, 87, 0, 0, 0, 7]),
            pod_mac: Mac([14, 87, 0, 0, 0, 7]),
            mtu: 1450,
            families: vec![
                Family {
                    address: "10.0.0.7".parse().unwrap(),
                    gateway: "169.254.1.1".parse().unwrap(),
                },
                Family {
                    address: "fd00::7".parse().unwrap(),
                    gateway: "fe80::1".parse().unwrap(),
                },
            ],
        };
        let text = success(version, &reservation, "eth0", "/run/netns/x");
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn version_1_1_0() {
        assert_eq!(
            result(Version::V1_1_0),
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "weir0123456789a", "mac": "0a:57:00:00:00:07", "mtu": 1450},
                    {"name": "eth0", "mac": "0e:57:00:00:00:07", "mtu": 1450,
                     "sandbox": "/run/netns/x"},
                ],
                "ips": [
                    {"address": "10.0.0.7/32", "gateway": "169.254.1.1", "interface": 1},
                    {"address": "fd00::7/128", "gateway": "fe80::1", "interface": 1},
                ],
                "routes": [
                    {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                    {"dst": "::/0", "gw": "fe80::1"},
                ],
                "dns": {},
            })
        );
    }

    #[test]
    fn mtu_only_from_1_1_0() {
        for version in [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0] {
            let result = result(version);
            assert_eq!(result["cniVersion"], version.as_str());
            for interface in result["interfaces"].as_array().unwrap() {
                assert!(interface.get("mtu").is_none(), "{version:?}");
            }
        }
    }

    #[test]
    fn addresses_name_their_family_only_before_1_0_0() {
        for version in [Version::V0_3_1, Version::V0_4_0] {
            let result = result(version);
            assert_eq!(result["ips"][0]["version"], "4");
            assert_eq!(result["ips"][1]["version"], "6");
        }
        for version in [Version::V1_0_0, Version::V1_1_0] {
            assert!(result(version)["ips"][0].get("version").is_none());
        }
    }
}
