//! Traffic that goes on while something else happens, and is counted.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    netns::NetNs,
    traffic::{Connection, TIMEOUT, UdpClient},
};

/// Failures that are kept in words; all are counted.
const FAILURES_KEPT: usize = 10;
/// Bytes of one echo of a long connection.
const ECHO: usize = 16_384;

/// Pause of a thread after each success. The agents share the processors with the load: what is tested is whether
/// anything breaks, not how much fits.
const PACE: Duration = Duration::from_millis(1);

/// Threads that make traffic until they are stopped.
#[derive(Debug, Default)]
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Failures tell how long after it they were seen: that says in which phase of a test.
    start: Instant,
    stop: AtomicBool,
    successes: AtomicU64,
    failures: AtomicU64,
    words: Mutex<Vec<String>>,
}

/// What a load did.
#[derive(Clone, Debug)]
pub struct Report {
    /// Connections, echoes or datagrams that went well.
    pub successes: u64,
    /// Those that failed.
    pub failures: u64,
    /// The first failures, in words.
    pub words: Vec<String>,
}

impl Report {
    /// Requires at least `successes` and no failure.
    ///
    /// # Errors
    ///
    /// When there were fewer, or failures.
    pub fn check(&self, successes: u64) -> Result<()> {
        ensure!(
            self.failures == 0,
            "{} failures beside {} successes: {:#?}",
            self.failures,
            self.successes,
            self.words
        );
        ensure!(
            self.successes >= successes,
            "only {} successes where {successes} were expected",
            self.successes
        );
        Ok(())
    }
}

impl Load {
    /// New TCP connections from `netns` to `to`, one after the other.
    ///
    /// # Errors
    ///
    /// When the namespace is gone.
    pub fn connections(mut self, netns: &NetNs, to: SocketAddr) -> Result<Self> {
        self.add(netns, move |shared| {
            while !shared.stopped() {
                shared.note(Connection::open(to).map(drop));
            }
        })?;
        Ok(self)
    }

    /// One TCP connection that echoes all the time; each echo counts, the first failure ends it.
    ///
    /// # Errors
    ///
    /// When the namespace is gone.
    pub fn long_connection(mut self, netns: &NetNs, to: SocketAddr) -> Result<Self> {
        self.add(netns, move |shared| {
            shared.note(echo_until_stopped(shared, to));
        })?;
        Ok(self)
    }

    /// Datagrams from one port, each with its answer.
    ///
    /// # Errors
    ///
    /// When the namespace is gone.
    pub fn datagrams(mut self, netns: &NetNs, to: SocketAddr) -> Result<Self> {
        self.add(netns, move |shared| match UdpClient::new(to) {
            Err(error) => shared.note(Err(error)),
            Ok(client) => {
                let mut number = 0_u64;
                while !shared.stopped() {
                    number += 1;
                    shared.note(client.ask(&number.to_be_bytes(), TIMEOUT).map(drop));
                }
            }
        })?;
        Ok(self)
    }

    fn add(&mut self, netns: &NetNs, work: impl FnOnce(&Shared) + Send + 'static) -> Result<()> {
        let shared = self.shared.clone();
        self.threads.push(netns.spawn(move || work(&shared))?);
        Ok(())
    }

    /// Waits until `count` more things went well, so that what follows happens under load.
    ///
    /// # Errors
    ///
    /// When that takes longer than `timeout`; with the first failures, if there were any.
    pub fn wait_for(&self, count: u64, timeout: Duration) -> Result<()> {
        let goal = self.shared.successes.load(Ordering::Relaxed) + count;
        let waited = crate::wait_until("the load to go on", timeout, || {
            Ok(self.shared.successes.load(Ordering::Relaxed) >= goal)
        });
        waited.map_err(|error| error.context(format!("{:#?}", self.shared.report())))
    }

    /// What it did so far.
    #[must_use]
    pub fn report(&self) -> Report {
        self.shared.report()
    }

    /// Stops it and reports.
    #[must_use]
    pub fn stop(mut self) -> Report {
        self.end();
        self.shared.report()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            stop: AtomicBool::default(),
            successes: AtomicU64::default(),
            failures: AtomicU64::default(),
            words: Mutex::default(),
        }
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn note(&self, result: Result<()>) {
        match result {
            Ok(()) => {
                self.successes.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(PACE);
            }
            Err(error) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
                if words.len() < FAILURES_KEPT {
                    let after = self.start.elapsed().as_secs_f32();
                    words.push(format!("after {after:.1} s: {error:#}"));
                }
            }
        }
    }

    fn report(&self) -> Report {
        Report {
            successes: self.successes.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            words: self
                .words
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}

fn echo_until_stopped(shared: &Shared, to: SocketAddr) -> Result<()> {
    let mut connection = Connection::open(to)?;
    connection.start_echo()?;
    let mut round = 0_u8;
    while !shared.stopped() {
        round = round.wrapping_add(1);
        connection.echo(&vec![round; ECHO])?;
        shared.note(Ok(()));
    }
    Ok(())
}
