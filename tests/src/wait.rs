//! Waiting for conditions with a deadline; tests never sleep for luck.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(10);

/// Calls `look` until it returns `Ok(Some(value))` and gives that value.
///
/// # Errors
///
/// At the deadline: what was waited for, and the last error of `look` if there was one. Errors
/// before the deadline count as "not yet".
pub fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        let last = match look() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= deadline {
            return match last {
                Some(error) => Err(error.context(format!("waited {timeout:?} for {what}"))),
                None => bail!("waited {timeout:?} in vain for {what}"),
            };
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Calls `look` until it returns true.
///
/// # Errors
///
/// As [`wait_for`].
pub fn wait_until(
    what: &str,
    timeout: Duration,
    mut look: impl FnMut() -> Result<bool>,
) -> Result<()> {
    wait_for(what, timeout, || Ok(look()?.then_some(())))
}
