//! What comes back from the device behind which the kernel puts datagrams together: fragments, the
//! first first. Each goes on as if it had only now come in by the device that it was taken from.

use aya_ebpf::programs::TcContext;
use weir_common::DropReason;

use super::{Kind, read_frame};
use crate::{
    family::{V4, V6},
    fragment,
    verdict::Verdict,
};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    match read_frame(ctx)?.kind {
        Kind::V4 => fragment::hand_back::<V4>(ctx),
        Kind::V6 => fragment::hand_back::<V6>(ctx),
        Kind::Arp | Kind::Other => Ok(Verdict::STACK),
    }
}
