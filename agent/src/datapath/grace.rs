//! Waits for RCU grace periods, so that memory which a program may still be reading is not given
//! to anyone else. Waiting takes milliseconds, so a thread of its own does it: what is retired
//! meanwhile forms one batch and shares the next period. Used by the service tables.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Sender},
    },
    thread,
};

use aya_obj::generated::{bpf_cmd, bpf_map_type};

use super::sys::{bpf, create_map, raw, zeroed_attr};

/// Things that may be used again once a grace period has passed since they were retired.
#[derive(Debug)]
pub struct Quarantine<T> {
    /// Retired, and no period has begun since.
    waiting: Vec<T>,
    /// Retired before the period that is under way began.
    passing: Vec<T>,
    requests: Sender<()>,
    done: Arc<Done>,
    /// Periods asked for.
    asked: u64,
}

#[derive(Debug, Default)]
struct Done {
    /// Periods that have passed, and whether the thread has given up.
    count: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Done {
    fn lock(&self) -> MutexGuard<'_, (u64, bool)> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Quarantine<T> {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// The two small maps that it needs, or the thread, cannot be made.
    pub fn new() -> io::Result<Self> {
        let barrier = Barrier::new()?;
        let done = Arc::new(Done::default());
        let (requests, inbox) = mpsc::channel();
        thread::Builder::new().name("weir-rcu".into()).spawn({
            let done = Arc::clone(&done);
            move || {
                for () in inbox {
                    let passed = barrier.wait();
                    let mut count = done.lock();
                    match passed {
                        Ok(()) => count.0 += 1,
                        Err(error) => {
                            tracing::error!(%error, "cannot wait for an RCU grace period: freed \
                                 slots and backends are not used again until the agent restarts");
                            count.1 = true;
                        }
                    }
                    done.changed.notify_all();
                }
            }
        })?;
        Ok(Self {
            waiting: Vec::new(),
            passing: Vec::new(),
            requests,
            done,
            asked: 0,
        })
    }

    /// Puts something in quarantine. No program can reach it any more, but one may be about to
    /// use what it read before.
    pub fn retire(&mut self, thing: T) {
        self.waiting.push(thing);
    }

    /// What is free again. Asks for the next period if there is need for one; does not block.
    pub fn release(&mut self) -> Vec<T> {
        let passed = self.done.lock().0;
        let free = if passed >= self.asked {
            std::mem::take(&mut self.passing)
        } else {
            Vec::new()
        };
        if passed >= self.asked && !self.waiting.is_empty() {
            self.passing = std::mem::take(&mut self.waiting);
            // The thread only ends with this sender.
            if self.requests.send(()).is_ok() {
                self.asked += 1;
            }
        }
        free
    }

    /// What is in quarantine now, after waiting for it: for tables that are full otherwise.
    pub fn release_all(&mut self) -> Vec<T> {
        let mut free = self.release();
        while !self.passing.is_empty() {
            let mut count = self.done.lock();
            while count.0 < self.asked && !count.1 {
                count = self
                    .done
                    .changed
                    .wait(count)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if count.1 {
                break;
            }
            drop(count);
            free.append(&mut self.release());
        }
        free
    }

    /// Number of things in quarantine.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len() + self.passing.len()
    }

    /// Whether nothing is in quarantine.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A map of maps of our own: the kernel ends an update of one with `synchronize_rcu`
/// (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c, since 4.20), which covers every program
/// on every map. membarrier(2) would do nothing on a machine with one processor.
struct Barrier {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl Barrier {
    fn new() -> io::Result<Self> {
        let inner = create_map(bpf_map_type::BPF_MAP_TYPE_ARRAY, 8, 1, 0, None)?;
        let outer = create_map(
            bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS,
            4,
            1,
            0,
            Some(inner.as_fd()),
        )?;
        Ok(Self { outer, inner })
    }

    fn wait(&self) -> io::Result<()> {
        let key = 0u32;
        let value = self.inner.as_raw_fd();
        let mut attr = zeroed_attr();
        attr.__bindgen_anon_2.map_fd = raw(self.outer.as_fd());
        attr.__bindgen_anon_2.key = std::ptr::from_ref(&key) as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = std::ptr::from_ref(&value) as u64;
        // SAFETY: key and value are the four bytes each that this map was made with.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }
}
