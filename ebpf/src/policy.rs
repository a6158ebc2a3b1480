//! Policy sets. An endpoint's row names one for each direction; set 0 allows everything and needs
//! no lookup and no flow entry. There is no table of other sets yet, so that any other number
//! denies: a set that is not known must not let through.

use weir_common::{DropReason, endpoint::POLICY_SET_ALLOW_ALL};

/// Whether a set needs connections to be tracked, so that replies are allowed.
#[inline(always)]
pub fn is_stateful(set: u32) -> bool {
    set != POLICY_SET_ALLOW_ALL
}

/// Judges a new connection by one set.
#[inline(always)]
pub fn judge(set: u32) -> Result<(), DropReason> {
    if set == POLICY_SET_ALLOW_ALL {
        Ok(())
    } else {
        Err(DropReason::PolicyDenied)
    }
}
