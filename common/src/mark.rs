//! The bits of the packet mark that Weir uses between its own hooks. They are four adjacent bits
//! whose place is configurable (`mark-mask`, default `0x00f0_0000`); kube-proxy uses `0x4000` and
//! `0x8000`, Cilium `0x0f00` and the upper half when a cluster mesh is on, Calico
//! `0xffff_0000` by default.

/// Default place of the four bits.
pub const DEFAULT_MASK: u32 = 0x00f0_0000;

/// The packet has been decided by a Weir program; later hooks on its way let it pass. On a fragment
/// that comes in: it has been put together with the others of its datagram and cut again.
pub const DONE: u32 = 0x1;
/// The packet was sent by the node itself, not by a pod.
pub const FROM_HOST: u32 = 0x2;
/// A dry run of `weir trace`: decide, do not commit.
pub const DRY_RUN: u32 = 0x4;
/// The packet has been encrypted.
pub const ENCRYPTED: u32 = 0x8;

/// The number of places the four bits are shifted, or `None` if `mask` is not four adjacent bits.
#[must_use]
pub const fn shift_of(mask: u32) -> Option<u32> {
    if mask.count_ones() == 4 && mask >> mask.trailing_zeros() == 0xf {
        Some(mask.trailing_zeros())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_four_adjacent_bits_make_a_mask() {
        assert_eq!(shift_of(DEFAULT_MASK), Some(20));
        assert_eq!(shift_of(0xf), Some(0));
        assert_eq!(shift_of(0xf000_0000), Some(28));
        for bad in [0, 1, 0xff, 0x0f01, 0x1111, 0x7] {
            assert_eq!(shift_of(bad), None, "{bad:#x}");
        }
    }
}
