//! Connections that are translated to an address which this node has lost; see [`crate::datapath::NodeSources`].

use super::Agent;
use crate::datapath::SweepReport;

impl Agent {
    /// Asks the kernel about addresses that connections are translated to and that stand on no device, and tells of what
    /// has been removed.
    pub(super) async fn look_after_sources(&mut self, report: &SweepReport) {
        if report.without_source > 0 {
            tracing::warn!(
                connections = report.without_source,
                "removed connections that were translated to an address which this node no longer has"
            );
        }
        self.ask_for_sources().await;
    }

    /// Asks the kernel about the addresses that are in doubt.
    pub(super) async fn ask_for_sources(&mut self) {
        let doubtful = self.datapath.node_sources().doubtful();
        if doubtful.is_empty() {
            return;
        }
        let answers = match self.netlink.are_local(doubtful).await {
            Ok(answers) => answers,
            Err(error) => {
                tracing::warn!(%error, "cannot tell whether addresses are still this node's");
                return;
            }
        };
        for (address, is_local) in answers {
            let Some(is_local) = is_local else {
                tracing::debug!(%address, "the kernel does not tell whether the address is this node's");
                continue;
            };
            let is_news = !self.datapath.node_sources().is_known_to_be_missing(address);
            if !is_local && is_news {
                tracing::info!(
                    %address,
                    "connections are translated to an address that this node no longer has: unless it comes back, \
                     those of UDP are removed after 3 seconds, those of TCP and SCTP after 60"
                );
            }
            if let Err(error) = self.datapath.settle_source(address, is_local) {
                tracing::warn!(%error, "cannot tell the time");
            }
        }
    }
}
