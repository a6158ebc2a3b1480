//! The table that tests are written as: packet in, verdict, packet out, lookups. [`Bed::check`] tries a
//! row; [`Bed::run_with`] runs a packet and tells what was seen and counted.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use weir_common::{
    DropReason, mark,
    metrics::{Hook, outcome},
};

use super::{Bed, ETH0, device};
use crate::{
    packet::Packet,
    run::{self, Input, Output},
};

pub const TC_ACT_UNSPEC: i32 = -1;
pub const TC_ACT_SHOT: i32 = 2;
pub const TC_ACT_REDIRECT: i32 = 7;

/// What became of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    Stack,
    /// To the stack, as received by the node's own device.
    HostDevice,
    Local,
    Remote,
    /// To the outside by the node's routes.
    Routed,
    Answered,
    /// To be put together with the others of its datagram, or back from there.
    Defrag,
    Dropped(DropReason),
    /// Dropped, and the sender was told so.
    Refused(DropReason),
}

/// Lookups of a packet, by table.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Lookups {
    pub flow: u64,
    pub ipcache: u64,
    pub frontend: u64,
    pub fragment: u64,
    pub by_ifindex: u64,
    pub affinity: u64,
    pub source_range: u64,
    pub route: u64,
    pub device_address: u64,
}

/// Lookups of an established connection: the promise.
pub const ESTABLISHED: Lookups = Lookups {
    flow: 1,
    ipcache: 0,
    frontend: 0,
    fragment: 0,
    by_ifindex: 0,
    affinity: 0,
    source_range: 0,
    route: 0,
    device_address: 0,
};

/// A packet that has been through a program.
#[derive(Clone, Debug)]
pub struct Seen {
    pub verdict: Verdict,
    pub output: Output,
    /// Counters of the flow table that rose: outcome and by how much.
    pub flow_counters: BTreeMap<u8, u64>,
    pub lookups: Lookups,
}

impl Seen {
    pub fn flow_counter(&self, outcome: u8) -> u64 {
        self.flow_counters.get(&outcome).copied().unwrap_or(0)
    }
}

impl Bed {
    /// Runs a program and nothing else.
    pub fn run_raw(&mut self, hook: Hook, frame: &[u8], input: Input) -> std::io::Result<Output> {
        let fd = self
            .datapath
            .program(hook)
            .unwrap()
            .fd()
            .unwrap()
            .as_fd()
            .as_raw_fd();
        // SAFETY: the program stays loaded as long as the bed.
        run::run(unsafe { BorrowedFd::borrow_raw(fd) }, frame, input)
    }

    /// Runs a program on a device, and sees what was counted.
    pub fn run_with(&mut self, hook: Hook, frame: &[u8], input: Input) -> Seen {
        let before = self.counted();
        let output = self.run_raw(hook, frame, input).unwrap();
        let after = self.counted();
        let mut verdicts = Vec::new();
        let mut flow_counters = BTreeMap::new();
        for ((at, outcome), packets) in after.0 {
            let risen = packets - before.0.get(&(at, outcome)).copied().unwrap_or(0);
            if risen == 0 || outcome == outcome::EVENT_LOST {
                continue;
            }
            if (outcome::FLOW_CREATED..=outcome::NAT_PORT_SEARCH).contains(&outcome) {
                *flow_counters.entry(outcome).or_default() += risen;
                continue;
            }
            assert_eq!((at, risen), (hook as u32, 1), "outcome {outcome}");
            verdicts.push(match outcome {
                outcome::STACK => Verdict::Stack,
                outcome::LOCAL => Verdict::Local,
                outcome::REMOTE => Verdict::Remote,
                outcome::ROUTED => Verdict::Routed,
                outcome::ANSWERED => Verdict::Answered,
                outcome::DEFRAG => Verdict::Defrag,
                reason => Verdict::Dropped(DropReason::from_number(reason)),
            });
        }
        assert_eq!(
            verdicts.len(),
            1,
            "every packet is counted once: {verdicts:?}"
        );
        let verdict = match verdicts[0] {
            Verdict::Dropped(reason) if flow_counters.contains_key(&outcome::REFUSED) => {
                Verdict::Refused(reason)
            }
            Verdict::Stack if output.action == TC_ACT_REDIRECT => Verdict::HostDevice,
            other => other,
        };
        let action = match verdict {
            Verdict::Stack => TC_ACT_UNSPEC,
            Verdict::Dropped(_) => TC_ACT_SHOT,
            _ => TC_ACT_REDIRECT,
        };
        assert_eq!(output.action, action, "what is counted is what happens");
        let rise = |at: usize| after.1[at] - before.1[at];
        Seen {
            verdict,
            output,
            flow_counters,
            lookups: Lookups {
                flow: rise(0),
                ipcache: rise(1),
                frontend: rise(2),
                fragment: rise(3),
                by_ifindex: rise(4),
                affinity: rise(6),
                source_range: rise(7),
                route: rise(8),
                device_address: rise(9),
            },
        }
    }

    /// What leaves a pod.
    pub fn pod_sends(&mut self, pod: u32, packet: &Packet) -> Seen {
        self.run_with(Hook::FromPod, &packet.frame(), on(device(pod)))
    }

    /// What comes in by the node's device.
    pub fn wire_brings(&mut self, packet: &Packet) -> Seen {
        self.run_with(Hook::FromNetdev, &packet.frame(), on(ETH0))
    }

    fn counted(&self) -> (BTreeMap<(u32, u8), u64>, Vec<u64>) {
        let counters = self.datapath.counters();
        let packets = counters
            .all()
            .unwrap()
            .into_iter()
            .map(|c| ((c.hook as u32, c.outcome), c.counter.packets))
            .collect();
        let lookups = counters.lookups().unwrap();
        (packets, lookups.into_iter().map(|(_, n)| n).collect())
    }

    /// Tries a row of a table. All wrong rows are reported together when the test ends.
    pub fn check(&mut self, case: Case) -> Seen {
        let input = Input {
            gso_size: case.gso_size,
            ..on(case.device)
        };
        let frame = case.frame.clone();
        let seen = self.run_with(case.hook, &frame, input);
        let out = match &case.out {
            Some(out) => out.clone(),
            None => frame.clone(),
        };
        let mut wrong = Vec::new();
        if seen.verdict != case.verdict {
            wrong.push(format!("{:?} instead of {:?}", seen.verdict, case.verdict));
        }
        if !matches!(seen.verdict, Verdict::Dropped(_)) && seen.output.frame != out {
            wrong.push(format!(
                "in       {}\n  out      {}\n  expected {}",
                hex(&frame),
                hex(&seen.output.frame),
                hex(&out)
            ));
        }
        if let Some(lookups) = case.lookups
            && lookups != seen.lookups
        {
            wrong.push(format!("{:?}\n  expected {lookups:?}", seen.lookups));
        }
        let answered = matches!(seen.verdict, Verdict::Answered | Verdict::Refused(_));
        let answered = answered && !matches!(case.hook, Hook::FromPod | Hook::FromHost);
        let done = matches!(seen.verdict, Verdict::Remote | Verdict::Routed) || answered;
        let expected_mark = if done { mark::DONE << 20 } else { 0 };
        if seen.output.mark != expected_mark {
            wrong.push(format!("mark {:#x}", seen.output.mark));
        }
        if wrong.is_empty() && case.sum_is_kept {
            wrong.extend(self.check_sum_is_kept(&case, &frame, &out, input));
        }
        for what in wrong {
            self.failures
                .push(format!("{}: {}: {what}", self.family.name(), case.name));
        }
        seen
    }

    /// The same with a packet of which the device has made the sum: the kernel answers
    /// [`run::WRONG_SUM`] if the program has not kept it true.
    fn check_sum_is_kept(
        &mut self,
        case: &Case,
        frame: &[u8],
        out: &[u8],
        input: Input,
    ) -> Option<String> {
        let flags = run::CHECKSUM_COMPLETE;
        match self.run_raw(case.hook, frame, Input { flags, ..input }) {
            Ok(again) if again.action == TC_ACT_SHOT || again.frame == out => None,
            Ok(again) => Some(format!(
                "summed by the device, it became {}",
                hex(&again.frame)
            )),
            Err(error) if error.raw_os_error() == Some(run::WRONG_SUM) => {
                Some("the sum of the device is wrong afterwards".into())
            }
            // Kernels before 6.11 have no such flag.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            Err(error) => Some(error.to_string()),
        }
    }
}

/// A device, nothing else.
pub fn on(ifindex: u32) -> Input {
    Input {
        ifindex,
        ..Input::default()
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A row of a table.
pub struct Case {
    name: String,
    hook: Hook,
    device: u32,
    frame: Vec<u8>,
    gso_size: u32,
    verdict: Verdict,
    out: Option<Vec<u8>>,
    lookups: Option<Lookups>,
    sum_is_kept: bool,
}

impl Case {
    /// A packet that leaves a pod and that comes out unchanged unless [`Self::out`] says so.
    pub fn from_pod(name: &str, pod: u32, packet: &Packet, verdict: Verdict) -> Self {
        Self::new(name, Hook::FromPod, device(pod), packet.frame(), verdict)
    }

    /// A packet that comes in from outside.
    pub fn from_netdev(name: &str, packet: &Packet, verdict: Verdict) -> Self {
        Self::new(name, Hook::FromNetdev, ETH0, packet.frame(), verdict)
    }

    /// A packet that the node sends to the end `device` of its own device, or to its loopback device.
    pub fn from_host(name: &str, device: u32, packet: &Packet, verdict: Verdict) -> Self {
        Self::new(name, Hook::FromHost, device, packet.frame(), verdict)
    }

    /// A packet that the host's stack sends to a pod.
    pub fn to_pod(name: &str, pod: u32, packet: &Packet, verdict: Verdict) -> Self {
        Self::new(name, Hook::ToPod, device(pod), packet.frame(), verdict)
    }

    pub fn new(name: &str, hook: Hook, device: u32, frame: Vec<u8>, verdict: Verdict) -> Self {
        Self {
            name: name.to_owned(),
            hook,
            device,
            frame,
            gso_size: 0,
            verdict,
            out: None,
            lookups: None,
            sum_is_kept: true,
        }
    }

    pub fn out(mut self, packet: &Packet) -> Self {
        self.out = Some(packet.frame());
        self
    }

    pub fn out_frame(mut self, frame: Vec<u8>) -> Self {
        self.out = Some(frame);
        self
    }

    pub fn gso(mut self, size: u32) -> Self {
        self.gso_size = size;
        self
    }

    pub fn lookups(mut self, lookups: Lookups) -> Self {
        self.lookups = Some(lookups);
        self
    }

    /// For a packet whose receiver never asks for the sum that a device has made: SCTP, pieces of
    /// datagrams, UDP without a checksum; and for answers, which no device that makes sums gets to
    /// see before they leave again.
    pub fn sum_may_change(mut self) -> Self {
        self.sum_is_kept = false;
        self
    }
}
