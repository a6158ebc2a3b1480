//! Packets that need no entry in the flow table: only their addresses decide.

use anyhow::Result;
use weir_agent::objects::Family;
use weir_common::{
    endpoint::{host_mac, pod_mac},
    metrics::{Hook, outcome},
};

use super::{
    Bench, family_name,
    frame::{Frame, Kind, Tuple},
    from_pod_frames,
    lab::{self, CLIENT, PLAIN_CLIENT, Route, UPLINK_MAC},
};
use crate::report::Table;

impl Bench {
    /// Packets of pods that have no entry: only addresses decide.
    pub(super) fn without_flows(&mut self, family: Family, table: &mut Table) -> Result<()> {
        let from_pod = self.program(Hook::FromPod)?;
        for (client, who) in [
            (PLAIN_CLIENT, "pod without Services"),
            (CLIENT, "pod that uses Services"),
        ] {
            for (route, to, way) in [
                (Route::LocalPod, "pod of this node", outcome::LOCAL),
                (Route::RemotePod, "pod of the other node", outcome::REMOTE),
            ] {
                if client == CLIENT {
                    self.make_client_stateful(family)?;
                }
                let device = self.lab.device(client);
                let mut row = vec![format!(
                    "`from_pod`, {who} to {to}, {}",
                    family_name(family)
                )];
                for flows in [self.plan.flows[0], self.plan.flows[1]] {
                    let tuples = lab::connections(family, route, client, flows);
                    let frames: Vec<Frame> = tuples
                        .iter()
                        .map(|tuple| {
                            Frame::new(tuple, Kind::Ack, host_mac(client), pod_mac(client))
                        })
                        .collect();
                    let ns = self.steady(&from_pod, Hook::FromPod, way, family, device, &frames)?;
                    row.push(ns.to_string());
                }
                table.row(row);
            }
        }
        self.arrivals(family, table)
    }

    fn arrivals(&mut self, family: Family, table: &mut Table) -> Result<()> {
        let from_netdev = self.program(Hook::FromNetdev)?;
        let mut row = vec![format!(
            "`from_netdev`, other node to a pod without Services, {}",
            family_name(family)
        )];
        for flows in [self.plan.flows[0], self.plan.flows[1]] {
            let frames: Vec<Frame> =
                lab::connections(family, Route::RemotePod, PLAIN_CLIENT, flows)
                    .iter()
                    .map(|tuple| {
                        let back = Tuple {
                            source: tuple.destination,
                            destination: tuple.source,
                        };
                        Frame::new(&back, Kind::Ack, UPLINK_MAC, host_mac(9))
                    })
                    .collect();
            let (way, device) = (outcome::LOCAL, self.lab.uplink());
            let ns = self.steady(&from_netdev, Hook::FromNetdev, way, family, device, &frames)?;
            row.push(ns.to_string());
        }
        table.row(row);
        Ok(())
    }

    /// One connection through a Service, so that the client's other packets ask the flow table.
    fn make_client_stateful(&mut self, family: Family) -> Result<()> {
        let tuples = lab::connections(family, Route::RemoteService, CLIENT, 1);
        let frames = from_pod_frames(&tuples, Kind::Syn);
        self.harness.set_frames(&frames, family == Family::V6)?;
        let from_pod = self.program(Hook::FromPod)?;
        let device = self.lab.device(CLIENT);
        self.harness.pair(&from_pod, device, 1)?;
        Ok(())
    }
}
