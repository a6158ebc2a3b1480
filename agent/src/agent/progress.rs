//! Publishes how far the loop is: the revision that is applied, for those who wait for one, and what health checks ask
//! about.

use std::{collections::BTreeMap, time::Instant};

use super::Agent;
use crate::{api::Progress, objects::ObjectName};

impl Agent {
    pub(super) fn publish_progress(&mut self) {
        let state = &self.source_state;
        let done = state.synced && self.rows.is_clean();
        let missing = if done { Vec::new() } else { self.missing() };
        self.progress.send_if_modified(|progress| {
            let applied = if done {
                state.revision
            } else {
                progress.applied
            };
            let now = Progress {
                revision: state.revision,
                applied,
                missing,
            };
            let changed = *progress != now;
            *progress = now;
            changed
        });
    }

    /// Says that the loop runs, at each tick, and what has changed of what health checks are about.
    pub(super) fn publish_health(&self, is_tick: bool) {
        let leaving = self.model.is_leaving(&self.settings.node_name);
        self.health.tell(|data_path| {
            data_path.synced = self.swept;
            data_path.leaving = leaving;
            if is_tick {
                data_path.alive = Instant::now();
                // Looks at every row that waits or fails: not for each change.
                data_path.waiting_since = self.rows.waiting_since();
                data_path.broken_since = self.rows.broken_since(&self.plan.leading);
                data_path.failing_services = self.failing_checked_services().into();
            }
        });
    }

    /// Services with a health check of which something cannot be applied, and since when.
    fn failing_checked_services(&self) -> BTreeMap<ObjectName, Instant> {
        let mut failing = self.rows.failing_services();
        failing.retain(|service, _| self.model.health_checks().contains_key(service));
        failing
    }

    /// What keeps the source's last revision from being applied.
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if !self.source_state.synced {
            missing.push("the source is not complete yet".to_owned());
        }
        let failed = self.rows.failed();
        missing.extend(failed.map(|(row, failure)| format!("{row}: {}", failure.error)));
        missing
    }
}
