//! Generators of traffic run on threads of their own: in a namespace, on a processor, until they
//! are done or told to stop.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::Result;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use weir_tests::netns::NetNs;

/// Which processor a side runs on: where both stand decides half of a round trip, so it must not
/// be left to the scheduler.
pub const CLIENT: usize = 0;
/// See [`CLIENT`].
pub const SERVER: usize = 1;

/// Says that a measurement is over.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Not over yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// It is over.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it is over.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Starts `work` on a thread in the namespace, on the processor of a side.
///
/// # Errors
///
/// The namespace's file cannot be duplicated.
pub fn start<T: Send + 'static>(
    netns: &NetNs,
    side: usize,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    netns.spawn(move || {
        let processors = std::thread::available_parallelism()?.get();
        let mut set = CpuSet::new();
        set.set(side % processors)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
        work()
    })
}

/// What a generator found, once it has ended.
///
/// # Errors
///
/// Its own, or that it panicked.
pub fn finish<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread
        .join()
        .map_err(|_| anyhow::anyhow!("a generator of traffic panicked"))?
}
