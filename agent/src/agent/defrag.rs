//! The device behind which the kernel puts together datagrams whose fragments come out of order: it is
//! there, with its program, and the programs of the other devices know it; or it is not, and they know
//! that.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use anyhow::Context as _;

use super::{Agent, Row};
use crate::{
    datapath::defrag::{self, AttachError},
    netlink::{
        Change, NetlinkEvent,
        defrag_device::{self, DEFRAG_DEVICE},
    },
};

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Defrag {
    /// Interface index of the node's end.
    device: Option<u32>,
    /// This kernel has no such thing. It is asked once: modules that come later are found by the next start.
    unavailable: bool,
}

impl Defrag {
    /// The device that has `from_defrag`.
    pub(super) fn program(&self) -> Option<u32> {
        self.device
    }

    /// For people, if it is wanted and cannot be had.
    pub(super) fn problem(&self) -> Option<String> {
        self.unavailable.then(|| {
            "fragments that come before their first are dropped (FRAG_NOT_FOUND) where ports matter: this \
             kernel cannot put datagrams together for Weir, which takes 6.6 with CONFIG_NETFILTER_BPF_LINK, \
             CONFIG_NF_DEFRAG_IPV4 and CONFIG_NF_DEFRAG_IPV6 (modules nf_defrag_ipv4 and nf_defrag_ipv6, loaded \
             or there to be loaded); restart the agent when it can, or set defragmentation to false to have it so"
                .to_owned()
        })
    }
}

/// Attaches with pins in `links`, and says in `refused` if the kernel cannot.
fn attach(links: PathBuf, refused: Arc<OnceLock<String>>) -> impl FnOnce() -> io::Result<()> {
    move || {
        defrag::attach(&links).map_err(|error| {
            if let AttachError::Unavailable { .. } = error {
                let _ = refused.set(error.to_string());
            }
            io::Error::other(error)
        })
    }
}

impl Agent {
    /// The device is there and has its program, or is not wanted and gone.
    pub(super) async fn apply_defrag(&mut self) -> anyhow::Result<()> {
        if !self.settings.defragmentation || self.defrag.unavailable {
            return self.remove_defrag().await;
        }
        if !defrag::is_available().context("cannot tell what this kernel can put together")? {
            return self.do_without_defrag().await;
        }
        let links = self.datapath.links().to_path_buf();
        let mut found = self.netlink.links().await?;
        let present = defrag_device::find(&found).filter(|_| defrag::is_attached(&links));
        let device = match present {
            Some(device) => device,
            None => {
                self.datapath.set_defrag_device(0)?;
                let refused = Arc::new(OnceLock::new());
                let made = self
                    .netlink
                    .make_defrag_device(attach(links, refused.clone()));
                let made = made.await;
                if let Some(error) = refused.get() {
                    tracing::warn!(error, "nothing puts datagrams together");
                    return self.do_without_defrag().await;
                }
                let device = made?;
                found = self.netlink.links().await?;
                device
            }
        };
        defrag_device::set_switches()?;
        let is_up = found.iter().any(|link| link.ifindex == device && link.up);
        if !is_up {
            self.netlink.set_link_up(device).await?;
        }
        if self.late.waiting {
            // The programs of an earlier agent go on.
            return Ok(());
        }
        if let Some(gone) = self.defrag.device.filter(|gone| *gone != device) {
            self.datapath.detach(gone)?;
        }
        self.datapath.attach_defrag(device, DEFRAG_DEVICE)?;
        self.defrag.device = Some(device);
        // Only now is there somebody who takes what comes back.
        self.datapath.set_defrag_device(device)?;
        Ok(())
    }

    /// The kernel cannot: there is a problem, and no further attempt.
    async fn do_without_defrag(&mut self) -> anyhow::Result<()> {
        self.defrag.unavailable = true;
        let problem = self.defrag.problem();
        tracing::warn!(problem);
        self.remove_defrag().await
    }

    async fn remove_defrag(&mut self) -> anyhow::Result<()> {
        self.datapath.set_defrag_device(0)?;
        let found = defrag_device::find(&self.netlink.links().await?);
        if let Some(device) = found {
            self.datapath.detach(device)?;
            let changes = vec![Change::RemoveLink(device)];
            if let Some(error) = self.netlink.apply(changes).await.into_iter().next() {
                return Err(error.into());
            }
        }
        defrag::detach(self.datapath.links())?;
        self.defrag.device = None;
        Ok(())
    }

    /// The device, when it is gone.
    pub(super) fn defrag_changed(&mut self, event: &NetlinkEvent) {
        if let (NetlinkEvent::LinkRemoved(gone), Some(device)) = (event, self.defrag.device)
            && device == *gone
        {
            self.mark(Row::Defrag);
        }
    }

    /// Marks the device when somebody has taken a part of it away. `with_state` has it looked at in any
    /// case. Gives the number of things missing.
    pub(super) fn find_defrag_drift(&mut self, with_state: bool) -> usize {
        let Some(device) = self.defrag.device else {
            return 0;
        };
        let is_whole =
            self.datapath.is_defrag_attached(device) && defrag::is_attached(self.datapath.links());
        let is_missing = !is_whole && !self.rows.is_known(&Row::Defrag);
        if is_missing {
            tracing::warn!("what puts datagrams together was taken away; making it again");
        }
        if is_missing || with_state {
            self.mark(Row::Defrag);
        }
        usize::from(is_missing)
    }
}
