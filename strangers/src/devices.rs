//! Devices and the programs on them, by netlink and by `bpf(2)`: XDP, tcx and filters of clsact.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::programs::{SchedClassifier, TcAttachType, loaded_programs};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage, LinkXdp},
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use weir_common::metrics::HOOKS;

use crate::{Findings, Owner};

/// Bytes of one datagram from the kernel, which makes none above 32 KiB.
const DATAGRAM_BYTES: usize = 64 * 1024;

/// A device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Device {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// Numbers of its XDP programs, with their modes.
    xdp: Vec<(XdpMode, u32)>,
}

/// A program on a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attached {
    /// Name of the device.
    pub device: String,
    /// Interface index.
    pub ifindex: u32,
    /// The program's name.
    pub program: String,
    /// And its number.
    id: u32,
    /// Where it is attached.
    pub hook: Hook,
}

/// Where a program is attached.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Hook {
    /// `ingress` or `egress`.
    Tcx(&'static str),
    /// A filter of clsact: what the kernel says of it, and the direction.
    Filter(Box<TcMessage>, &'static str),
    /// XDP.
    Xdp(XdpMode),
}

/// How an XDP program runs. A device has one program in each mode.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum XdpMode {
    /// In the stack.
    Generic,
    /// In the driver.
    Driver,
    /// In the hardware.
    Offload,
}

impl XdpMode {
    /// `XDP_FLAGS_SKB_MODE`, `_DRV_MODE`, `_HW_MODE` (linux/if_link.h): without one of them the kernel looks in
    /// another mode than the program's, and says that all is well.
    const fn flag(self) -> u32 {
        match self {
            Self::Generic => 1 << 1,
            Self::Driver => 1 << 2,
            Self::Offload => 1 << 3,
        }
    }

    /// As `ip link` calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::Generic => "xdpgeneric",
            Self::Driver => "xdpdrv",
            Self::Offload => "xdpoffload",
        }
    }
}

impl Attached {
    /// For people: `tcx ingress`.
    pub fn hook_name(&self) -> String {
        match &self.hook {
            Hook::Tcx(direction) => format!("tcx {direction}"),
            Hook::Filter(_, direction) => format!("clsact {direction}"),
            Hook::Xdp(mode) => mode.name().to_owned(),
        }
    }

    fn remedy(&self) -> String {
        let (device, program) = (&self.device, &self.program);
        match &self.hook {
            Hook::Tcx(direction) => {
                format!("bpftool net detach tcx_{direction} name {program} dev {device}")
            }
            Hook::Filter(filter, direction) => format!(
                "tc filter del dev {device} {direction} pref {}",
                filter.header.info >> 16
            ),
            Hook::Xdp(mode) => format!("ip link set dev {device} {} off", mode.name()),
        }
    }

    /// Takes the program off.
    ///
    /// # Errors
    ///
    /// If the kernel refuses; a program held by a link goes with the link alone.
    pub fn detach(&self) -> io::Result<()> {
        match &self.hook {
            Hook::Tcx(direction) => detach_tcx(self.ifindex, self.id, direction),
            Hook::Filter(filter, _) => {
                let mut message = TcMessage::default();
                message.header = filter.header.clone();
                let kind = TcAttribute::Kind("bpf".to_owned());
                message.attributes.push(kind);
                acknowledged(RouteNetlinkMessage::DelTrafficFilter(message))
            }
            Hook::Xdp(mode) => {
                let mut message = LinkMessage::default();
                message.header.index = self.ifindex;
                let none = vec![LinkXdp::Fd(-1), LinkXdp::Flags(mode.flag())];
                message.attributes.push(LinkAttribute::Xdp(none));
                acknowledged(RouteNetlinkMessage::SetLink(message))
            }
        }
    }
}

/// All devices.
///
/// # Errors
///
/// If the kernel does not tell.
pub fn devices() -> io::Result<Vec<Device>> {
    let messages = dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(messages.iter().filter_map(device).collect())
}

fn device(message: &RouteNetlinkMessage) -> Option<Device> {
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    let mut device = Device {
        ifindex: link.header.index,
        name: String::new(),
        xdp: Vec::new(),
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => name.clone_into(&mut device.name),
            LinkAttribute::Xdp(all) => device.xdp.extend(all.iter().filter_map(|xdp| match xdp {
                LinkXdp::SkbProgId(id) => Some((XdpMode::Generic, *id)),
                LinkXdp::DrvProgId(id) => Some((XdpMode::Driver, *id)),
                LinkXdp::HwProgId(id) => Some((XdpMode::Offload, *id)),
                _ => None,
            })),
            _ => {}
        }
    }
    Some(device)
}

/// Removes a device; that it is gone already is no error.
///
/// # Errors
///
/// If the kernel refuses.
pub fn remove(device: &Device) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = device.ifindex;
    match acknowledged(RouteNetlinkMessage::DelLink(message)) {
        // Both ends of a pair go at once.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        removed => removed,
    }
}

/// All programs on devices.
///
/// # Errors
///
/// If the kernel does not tell.
pub fn attached(devices: &[Device]) -> io::Result<Vec<Attached>> {
    let names: BTreeMap<u32, String> = loaded_programs()
        .flatten()
        .filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned())))
        .collect();
    let name = |id: u32| names.get(&id).cloned().unwrap_or_else(|| format!("#{id}"));
    let mut all = Vec::new();
    for device in devices {
        let mut add = |id, hook| {
            all.push(Attached {
                device: device.name.clone(),
                ifindex: device.ifindex,
                program: name(id),
                id,
                hook,
            });
        };
        for (mode, id) in &device.xdp {
            add(*id, Hook::Xdp(*mode));
        }
        for (direction, kind, parent) in [
            ("ingress", TcAttachType::Ingress, TcHandle::MIN_INGRESS),
            ("egress", TcAttachType::Egress, TcHandle::MIN_EGRESS),
        ] {
            // Before 6.6 there is no tcx.
            let (_, programs) = SchedClassifier::query_tcx(&device.name, kind).unwrap_or_default();
            for program in programs {
                add(program.id(), Hook::Tcx(direction));
            }
            for filter in filters(device, parent)? {
                if let Some(id) = program_of(&filter) {
                    add(id, Hook::Filter(Box::new(filter), direction));
                }
            }
        }
    }
    Ok(all)
}

/// Filters of a device in a direction; none where there is no such qdisc.
fn filters(device: &Device, parent: u16) -> io::Result<Vec<TcMessage>> {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(device.ifindex).unwrap_or_default();
    message.header.parent = TcHandle {
        major: 0xffff,
        minor: parent,
    };
    let messages = match dump(RouteNetlinkMessage::GetTrafficFilter(message)) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::ENODEV)
            ) =>
        {
            return Ok(Vec::new());
        }
        messages => messages?,
    };
    let filters = messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
        _ => None,
    });
    Ok(filters.collect())
}

/// Number of the program of a filter; `None` if it has none.
fn program_of(filter: &TcMessage) -> Option<u32> {
    filter
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Options(options) => options.iter().find_map(|option| match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                _ => None,
            }),
            _ => None,
        })
}

/// Start of `union bpf_attr` for `BPF_PROG_DETACH` (linux/bpf.h).
#[repr(C)]
struct DetachAttributes {
    target_ifindex: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
    relative_fd: u32,
    expected_revision: u64,
}

/// Takes a program off that was attached by tcx without a link.
fn detach_tcx(ifindex: u32, id: u32, direction: &str) -> io::Result<()> {
    const BPF_PROG_DETACH: libc::c_long = 9;
    const BPF_TCX_INGRESS: u32 = 46;
    const BPF_TCX_EGRESS: u32 = 47;
    let mut programs = loaded_programs().flatten();
    // Gone with its last attachment.
    let Some(program) = programs.find(|program| program.id() == id) else {
        return Ok(());
    };
    let program = program.fd().map_err(io::Error::other)?;
    let descriptor = program.as_fd().as_raw_fd();
    let attributes = DetachAttributes {
        target_ifindex: ifindex,
        attach_bpf_fd: u32::try_from(descriptor).unwrap_or_default(),
        attach_type: if direction == "ingress" {
            BPF_TCX_INGRESS
        } else {
            BPF_TCX_EGRESS
        },
        attach_flags: 0,
        replace_bpf_fd: 0,
        relative_fd: 0,
        expected_revision: 0,
    };
    // SAFETY: the kernel reads the attributes, which live through the call, and no more than their size.
    let detached = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_DETACH,
            &raw const attributes,
            size_of::<DetachAttributes>(),
        )
    };
    if detached == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EBUSY) => Err(io::Error::other(
            "a link holds it: end the process that has the link, or remove its pin (`bpftool link`)",
        )),
        error => Err(error),
    }
}

/// See [`crate::look`].
pub fn look(findings: &mut Findings) {
    let devices = findings.or_default("devices", devices());
    for owner in Owner::ALL {
        for device in devices
            .iter()
            .filter(|device| owner.owns_device(&device.name))
        {
            let why = match owner {
                Owner::KubeProxy => {
                    "it holds addresses of Services, which Weir takes for the node's own: they are not served"
                }
                Owner::Cilium => "its programs and routes may take packets that are for Weir",
            };
            findings.add(
                format!("the device {} is {}'s", device.name, owner.name()),
                why,
                owner.remedy(),
            );
        }
    }
    let attached = findings.or_default("programs of devices", attached(&devices));
    let is_ours = |program: &str| HOOKS.iter().any(|hook| hook.name() == program);
    for program in attached
        .iter()
        .filter(|attached| !is_ours(&attached.program))
    {
        let owner = Owner::ALL
            .into_iter()
            .find(|owner| owner.owns_program(&program.program));
        let whose = owner.map_or("somebody else's", |_| "Cilium's");
        findings.add(
            format!(
                "the program {} on {} ({}) is {whose}",
                program.program,
                program.device,
                program.hook_name()
            ),
            "it sees packets beside Weir's programs, and may change, redirect or drop them",
            owner.map_or_else(|| program.remedy(), |owner| owner.remedy().to_owned()),
        );
    }
}

fn dump(message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST | NLM_F_DUMP)
}

fn acknowledged(message: RouteNetlinkMessage) -> io::Result<()> {
    exchange(message, NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// One request, and all that the kernel answers.
fn exchange(message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut answers = Vec::new();
    let mut received = Vec::with_capacity(DATAGRAM_BYTES);
    loop {
        received.clear();
        match socket.recv(&mut received, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            size => size?,
        };
        let mut rest = received.as_slice();
        while let Some(length) = rest
            .first_chunk::<4>()
            .map(|b| u32::from_ne_bytes(*b) as usize)
        {
            if length < 16 || length > rest.len() {
                break;
            }
            // The kernel may be newer than the decoder: one strange device must not hide the others.
            if let Ok(answer) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length])
            {
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) => match error.raw_code() {
                        0 => return Ok(answers),
                        code => return Err(io::Error::from_raw_os_error(code.abs())),
                    },
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(io::Error::from_raw_os_error(done.code.abs()));
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    _ => {}
                }
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
