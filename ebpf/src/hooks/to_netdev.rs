//! All that leaves the node by its devices. What another program of ours has decided carries the
//! mark, which ends here; the rest is the node's own traffic and passes. (Masquerade and reverse
//! translation for clients outside have their place here.)

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, mark};

use crate::{access, switches, verdict::Verdict};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let shift = switches::mark_shift();
    let value = access::mark(ctx);
    if value & (mark::DONE << shift) != 0 {
        // Our bits mean nothing beyond this node.
        ctx.set_mark(value & !(0xf << shift));
    }
    Ok(Verdict::STACK)
}
