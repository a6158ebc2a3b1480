//! Looks for what others have left or run on the node, for `weir status`: on a thread of its own, as the system's
//! tools are slow where there are many rules. The event loop only takes what was found last.

use std::{
    io,
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use weir_api::v1;
use weir_strangers::{Findings, Places, look};

/// Between two looks.
const PAUSE: Duration = Duration::from_mins(5);
/// As long what was found counts as new: whoever cleans up asks again and again whether all is gone.
const NEW: Duration = Duration::from_secs(3);

/// The thread's other end. The thread ends with it.
#[derive(Debug)]
pub(super) struct Strangers {
    again: mpsc::SyncSender<()>,
    found: watch::Receiver<Option<(Findings, Instant)>>,
}

impl Strangers {
    /// Starts to look, now and every few minutes.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub(super) fn start(places: Places) -> io::Result<Self> {
        // One place: whoever asks while somebody has asked already wants no more.
        let (again, asked) = mpsc::sync_channel(1);
        let (sender, found) = watch::channel(None);
        std::thread::Builder::new()
            .name("weir-strangers".to_owned())
            .spawn(move || {
                let mut errors = Vec::new();
                loop {
                    let findings = look(&places);
                    for error in findings.errors.iter().filter(|e| !errors.contains(*e)) {
                        tracing::warn!(error, "while looking for what others have on this node");
                    }
                    errors.clone_from(&findings.errors);
                    sender.send_replace(Some((findings, Instant::now())));
                    if asked.recv_timeout(PAUSE) == Err(RecvTimeoutError::Disconnected) {
                        return;
                    }
                }
            })?;
        Ok(Self { again, found })
    }

    /// What was found last; `None` as long as the first look lasts. If there was something, another look begins:
    /// it may be gone by now, and who asks next is told.
    pub(super) fn found(&self) -> Option<v1::Strangers> {
        let findings = self.found.borrow();
        let (Findings { strangers, errors }, at) = findings.as_ref()?;
        if !strangers.is_empty() && at.elapsed() > NEW {
            // Full: somebody has asked.
            let _ = self.again.try_send(());
        }
        let found = strangers.iter().map(|stranger| v1::Stranger {
            what: stranger.what.clone(),
            why: stranger.why.clone(),
            remedy: stranger.remedy.clone(),
        });
        Some(v1::Strangers {
            found: found.collect(),
            errors: errors.clone(),
        })
    }
}
