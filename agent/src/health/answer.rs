//! The answers, in kube-proxy's words (`pkg/proxy/healthcheck`). Pure: the caller tells the time.

use std::time::{Duration, Instant, UNIX_EPOCH};

use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    body::Bytes,
    header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use super::DataPath;
use crate::{
    model::HealthCheck,
    objects::{Family, ObjectName},
};

/// How many endpoints a load balancer may count on here (KEP-3458).
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is served at a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Site {
    /// `/healthz` and `/livez`.
    Proxy,
    /// The health check of a Service, whatever the path.
    Service(ObjectName, HealthCheck),
}

/// The time, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For differences.
    pub instant: Instant,
    /// For people.
    pub wall: Timestamp,
}

impl Now {
    /// This moment.
    pub fn read() -> Self {
        Self {
            instant: Instant::now(),
            wall: wall_clock(),
        }
    }

    /// The time of an earlier moment, RFC 3339, in UTC.
    fn of(self, earlier: Instant) -> String {
        let ago = self.instant.saturating_duration_since(earlier);
        (self.wall - Duration::from_secs(ago.as_secs())).to_string()
    }
}

/// In whole seconds; 1970 where the clock is before that.
fn wall_clock() -> Timestamp {
    let since = UNIX_EPOCH.elapsed().unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or_default();
    Timestamp::from_second(seconds).unwrap_or_default()
}

/// Answers a request for `path` that came in by a family.
pub fn answer(
    site: &Site,
    path: &str,
    family: Family,
    data_path: &DataPath,
    now: Now,
) -> Response<Full<Bytes>> {
    let is_healthy = data_path.is_healthy(now.instant);
    match (site, path) {
        (Site::Service(service, check), _) => {
            let count = check.ready_endpoints(family);
            let is_healthy = is_healthy && data_path.is_applied(service, now.instant);
            let body = json!({
                "service": {"namespace": service.namespace, "name": service.name},
                "localEndpoints": count,
                "serviceProxyHealthy": is_healthy,
            });
            let mut response = response(count > 0 && is_healthy, &body);
            response.headers_mut().insert(WEIGHT, count.into());
            response
        }
        (Site::Proxy, "/healthz") => {
            let mut body = times(data_path.updated(), is_healthy, now);
            body["nodeEligible"] = (!data_path.leaving).into();
            response(is_healthy && !data_path.leaving, &body)
        }
        // What restarts an agent must not restart it because its node goes, nor because something is broken
        // or missing that another start finds as it is.
        (Site::Proxy, "/livez") => {
            let is_alive = data_path.is_alive(now.instant);
            response(is_alive, &times(data_path.alive, is_alive, now))
        }
        (Site::Proxy, _) => {
            let body = json!({"error": "not found; /healthz and /livez are served here"});
            let mut response = response(false, &body);
            *response.status_mut() = StatusCode::NOT_FOUND;
            response
        }
    }
}

/// While all is well the last update is now, as kube-proxy has it; else it was at `last`.
fn times(last: Instant, is_well: bool, now: Now) -> serde_json::Value {
    let updated = if is_well { now.instant } else { last };
    json!({"lastUpdated": now.of(updated), "currentTime": now.of(now.instant)})
}

fn response(good: bool, body: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_string()));
    if !good {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use hyper::body::Body as _;
    use serde_json::Value;

    use super::{super::STALE_AFTER, *};

    fn ask(
        site: &Site,
        path: &str,
        family: Family,
        data_path: &DataPath,
        now: Now,
    ) -> (u16, Value) {
        let response = answer(site, path, family, data_path, now);
        let headers = response.headers();
        assert_eq!(headers[CONTENT_TYPE], "application/json");
        assert_eq!(headers[X_CONTENT_TYPE_OPTIONS], "nosniff");
        let status = response.status().as_u16();
        let weight = headers.get(&WEIGHT).map(|w| w.to_str().unwrap().to_owned());
        let mut body = pin!(response.into_body());
        let Poll::Ready(Some(Ok(frame))) = body
            .as_mut()
            .poll_frame(&mut Context::from_waker(Waker::noop()))
        else {
            panic!("no body");
        };
        let json: Value = serde_json::from_slice(frame.data_ref().unwrap()).unwrap();
        let counted = json.get("localEndpoints").map(ToString::to_string);
        assert_eq!(weight, counted);
        (status, json)
    }

    fn synced() -> DataPath {
        DataPath {
            synced: true,
            ..DataPath::starting()
        }
    }

    #[test]
    fn a_service_is_healthy_with_endpoints_on_a_healthy_node() {
        let check = |v4, v6| HealthCheck { port: 1, v4, v6 };
        let stale = DataPath {
            waiting_since: Some(Instant::now() - 2 * STALE_AFTER),
            ..synced()
        };
        let long_ago = Instant::now() - 2 * STALE_AFTER;
        let failing = |name| DataPath {
            failing_services: BTreeMap::from([(ObjectName::new("ns", name), long_ago)]).into(),
            ..synced()
        };
        let leaving = DataPath {
            leaving: true,
            ..synced()
        };
        for (check, family, data_path, status, count) in [
            (check(Some(2), Some(1)), Family::V4, synced(), 200, 2),
            (check(Some(2), Some(1)), Family::V6, synced(), 200, 1),
            (check(Some(2), Some(0)), Family::V6, synced(), 503, 0),
            (check(Some(0), Some(1)), Family::V4, synced(), 503, 0),
            (check(None, Some(3)), Family::V4, synced(), 200, 3),
            (check(Some(3), None), Family::V6, synced(), 200, 3),
            (check(Some(2), None), Family::V4, stale, 503, 2),
            (check(Some(2), None), Family::V4, leaving, 200, 2),
            (check(Some(2), None), Family::V4, failing("web"), 503, 2),
            (check(Some(2), None), Family::V4, failing("other"), 200, 2),
            (
                check(Some(2), None),
                Family::V4,
                DataPath::starting(),
                503,
                2,
            ),
        ] {
            let site = Site::Service(ObjectName::new("ns", "web"), check);
            for path in ["/", "/healthz", "/any/thing"] {
                let (found, body) = ask(&site, path, family, &data_path, Now::read());
                assert_eq!(found, status, "{check:?} {family:?} {data_path:?}");
                let healthy = status == 200 || count == 0;
                let wanted = json!({
                    "service": {"namespace": "ns", "name": "web"},
                    "localEndpoints": count,
                    "serviceProxyHealthy": healthy,
                });
                assert_eq!(body, wanted);
            }
        }
    }

    #[test]
    fn what_is_not_healthy_may_live() {
        let now = Now {
            instant: Instant::now(),
            wall: "2026-01-01T00:10:00Z".parse().unwrap(),
        };
        let stale = DataPath {
            alive: now.instant.checked_sub(Duration::from_secs(300)).unwrap(),
            ..synced()
        };
        let leaving = DataPath {
            leaving: true,
            ..synced()
        };
        let noon = "2026-01-01T00:10:00Z";
        let long_ago = now.instant - Duration::from_secs(300);
        let broken = DataPath {
            broken_since: Some(long_ago),
            ..synced()
        };
        let waiting = DataPath {
            waiting_since: Some(long_ago),
            ..synced()
        };
        let one_service = DataPath {
            failing_services: BTreeMap::from([(ObjectName::new("ns", "web"), long_ago)]).into(),
            ..synced()
        };
        let earlier = "2026-01-01T00:05:00Z";
        for (data_path, healthz, livez, updated, lived) in [
            (synced(), 200, 200, noon, noon),
            (leaving, 503, 200, noon, noon),
            (stale, 503, 503, earlier, earlier),
            (broken, 503, 200, earlier, noon),
            (waiting, 503, 200, earlier, noon),
            (one_service, 200, 200, noon, noon),
            (DataPath::starting(), 503, 200, noon, noon),
        ] {
            let ask = |path| ask(&Site::Proxy, path, Family::V4, &data_path, now);
            let times = |last| json!({"lastUpdated": last, "currentTime": noon});
            assert_eq!(ask("/livez"), (livez, times(lived)), "{data_path:?}");
            let mut body = times(updated);
            body["nodeEligible"] = (!data_path.leaving).into();
            assert_eq!(ask("/healthz"), (healthz, body), "{data_path:?}");
            assert_eq!(ask("/").0, 404);
        }
    }
}
