//! What the data path has attached: the verbs for programs of devices, of sockets and of the device behind
//! which datagrams are put together. How it is done is in [`super::attach`], [`super::sockets`] and
//! [`super::defrag`].

use std::{collections::BTreeSet, os::fd::OwnedFd, path::Path};

use weir_common::metrics::Hook;

use super::{
    AttachMode, Attachment, Datapath, DatapathError, DeviceTable, attach, defrag, loader, sockets,
};
use crate::node::devices::SourceAddresses;

impl Datapath {
    /// How programs are attached on this kernel.
    #[must_use]
    pub fn attach_mode(&self) -> AttachMode {
        self.attacher.mode
    }

    /// Attaches `from_pod` and `to_pod` to the host side of a pod's veth pair, or replaces what
    /// is attached there. Replies of the pod are handled only once both are.
    ///
    /// # Errors
    ///
    /// The device is gone or not the one meant, or the kernel's.
    pub fn attach_endpoint(&mut self, ifindex: u32, device: &str) -> Result<(), DatapathError> {
        let _held = self.expedite.hold();
        self.attach(Hook::ToPod, ifindex, device)?;
        self.attach(Hook::FromPod, ifindex, device)
    }

    /// Attaches `from_netdev` and `to_netdev` to a device of the node, or replaces what is there, and then
    /// has pods send to the outside by it, from `sources`. Until then what they send by it is dropped.
    ///
    /// # Errors
    ///
    /// The device is gone or not the one meant, the table of devices is full, or the kernel's.
    pub fn attach_device(
        &mut self,
        ifindex: u32,
        device: &str,
        sources: SourceAddresses,
    ) -> Result<(), DatapathError> {
        let _held = self.expedite.hold();
        if !self.devices.is_attached(ifindex) {
            self.devices.remove(ifindex)?;
        }
        let has_link_layer =
            attach::has_link_layer(device).map_err(|source| DatapathError::Attach {
                program: Hook::FromNetdev.name(),
                device: device.to_owned(),
                ifindex,
                source,
            })?;
        for hook in [Hook::ToNetdev, Hook::FromNetdev] {
            if has_link_layer {
                self.attach(hook, ifindex, device)?;
            } else {
                let program = loader::bare_program(hook);
                loader::load_program(&mut self.ebpf, program)?;
                self.attach_program(program, hook, ifindex, device)?;
            }
        }
        Ok(self.devices.set(ifindex, sources, true)?)
    }

    /// Detaches every program from a device of the node, after pods no longer get an address there;
    /// `sources` as of now, `None` if the device is gone.
    ///
    /// # Errors
    ///
    /// A pin cannot be removed, the table of devices is full, or the kernel's.
    pub fn leave_device(
        &mut self,
        ifindex: u32,
        sources: Option<SourceAddresses>,
    ) -> Result<(), DatapathError> {
        match sources {
            Some(sources) => self.devices.set(ifindex, sources, false)?,
            None => self.devices.remove(ifindex)?,
        }
        self.detach(ifindex)
    }

    /// What pods send from at the devices of the node.
    #[must_use]
    pub fn devices(&self) -> &DeviceTable {
        &self.devices
    }

    /// Whether both programs are attached to the host side of a pod's veth pair.
    #[must_use]
    pub fn is_endpoint_attached(&self, ifindex: u32) -> bool {
        self.is_attached([Hook::FromPod, Hook::ToPod], ifindex)
    }

    /// Whether both programs are attached to a device of the node.
    #[must_use]
    pub fn is_device_attached(&self, ifindex: u32) -> bool {
        self.is_attached([Hook::FromNetdev, Hook::ToNetdev], ifindex)
    }

    fn is_attached<const N: usize>(&self, hooks: [Hook; N], ifindex: u32) -> bool {
        hooks
            .into_iter()
            .all(|hook| self.attacher.is_attached(hook, ifindex))
    }

    fn attach(&mut self, hook: Hook, ifindex: u32, device: &str) -> Result<(), DatapathError> {
        self.attach_program(hook.name(), hook, ifindex, device)
    }

    fn attach_program(
        &mut self,
        program: &'static str,
        hook: Hook,
        ifindex: u32,
        device: &str,
    ) -> Result<(), DatapathError> {
        if self.attacher.is_attached(hook, ifindex) {
            self.layout.commit()?;
        }
        let program = loader::program(&mut self.ebpf, program)?;
        self.attacher.attach(program, hook, ifindex, device)
    }

    /// Attaches the programs of sockets to a cgroup, or replaces what is attached there.
    ///
    /// # Errors
    ///
    /// The folder is no cgroup of version 2, or the kernel's.
    pub fn attach_sockets(&mut self, cgroup: &Path) -> Result<(), DatapathError> {
        self.layout.commit()?;
        sockets::attach(&mut self.ebpf, &self.attacher.folder, cgroup)
    }

    /// Detaches the programs of sockets; none attached is no error.
    ///
    /// # Errors
    ///
    /// A pin cannot be removed.
    pub fn detach_sockets(&self) -> Result<(), DatapathError> {
        sockets::detach(&self.attacher.folder)
    }

    /// The programs of sockets that are attached, each with its identifier.
    #[must_use]
    pub fn socket_programs(&self) -> Vec<(&'static str, u32)> {
        sockets::attached(&self.ebpf, &self.attacher.folder)
    }

    /// Whether the programs of sockets are attached.
    #[must_use]
    pub fn are_sockets_attached(&self) -> bool {
        sockets::are_attached(&self.attacher.folder)
    }

    /// A handle on the map in which sockets remember what they were translated from; its values are
    /// for [`sockets::frontend_of`].
    ///
    /// # Errors
    ///
    /// There is no free file descriptor.
    pub fn socket_frontends(&self) -> Result<OwnedFd, DatapathError> {
        sockets::frontends(&self.ebpf)
    }

    /// Attaches `from_host` to our end of the node's own device, or to the loopback device, or
    /// replaces what is there.
    ///
    /// # Errors
    ///
    /// The device is gone or not the one meant, or the kernel's.
    pub fn attach_host(&mut self, ifindex: u32, device: &str) -> Result<(), DatapathError> {
        let _held = self.expedite.hold();
        self.attach(Hook::FromHost, ifindex, device)
    }

    /// Whether `from_host` is attached to a device.
    #[must_use]
    pub fn is_host_attached(&self, ifindex: u32) -> bool {
        self.is_attached([Hook::FromHost], ifindex)
    }

    /// Attaches `from_defrag` to the device behind which datagrams are put together, or replaces what is
    /// there.
    ///
    /// # Errors
    ///
    /// The device is gone or not the one meant, or the kernel's.
    pub fn attach_defrag(&mut self, ifindex: u32, device: &str) -> Result<(), DatapathError> {
        let _held = self.expedite.hold();
        self.attach(Hook::FromDefrag, ifindex, device)
    }

    /// Whether `from_defrag` is attached to a device.
    #[must_use]
    pub fn is_defrag_attached(&self, ifindex: u32) -> bool {
        self.is_attached([Hook::FromDefrag], ifindex)
    }

    /// Tells the programs the device behind which datagrams are put together; 0: there is none.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn set_defrag_device(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        self.defrag
            .update(&0u32.to_ne_bytes(), &ifindex.to_ne_bytes())
            .map_err(|source| DatapathError::Map {
                name: "DEFRAG",
                source,
            })
    }

    /// Lets go of what puts datagrams together, and with it of the namespace that it does so in.
    ///
    /// # Errors
    ///
    /// A pin cannot be removed.
    pub fn detach_defrag(&self) -> Result<(), DatapathError> {
        let folder = &self.attacher.folder;
        defrag::detach(folder).map_err(|error| DatapathError::pin(folder, error))
    }

    /// Folder of the pins of links.
    #[must_use]
    pub fn links(&self) -> &Path {
        &self.attacher.folder
    }

    /// Detaches every program from a device; one that is gone, or has none, is no error.
    ///
    /// # Errors
    ///
    /// A pin cannot be removed.
    pub fn detach(&self, ifindex: u32) -> Result<(), DatapathError> {
        let _held = self.expedite.hold();
        self.attacher.detach(ifindex)
    }

    /// What is attached, also by an earlier agent.
    ///
    /// # Errors
    ///
    /// The folder of the links cannot be read.
    pub fn attachments(&self) -> Result<Vec<Attachment>, DatapathError> {
        self.attacher.attachments()
    }

    /// Detaches from every device whose index is not in `keep`, and forgets devices that are
    /// gone. Gives the indices swept.
    ///
    /// # Errors
    ///
    /// A pin cannot be removed.
    pub fn sweep_attachments(&self, keep: &BTreeSet<u32>) -> Result<BTreeSet<u32>, DatapathError> {
        let _held = self.expedite.hold();
        self.attacher.sweep(keep)
    }
}
