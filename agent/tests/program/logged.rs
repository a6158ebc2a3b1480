//! The log of every packet, which only a build for developers has.

use aya_obj::Object;
use weir_agent::datapath::object::OBJECT;

#[test]
fn only_the_build_for_developers_has_a_packet_log() {
    let object = Object::parse(OBJECT).unwrap();
    let has_log = object.maps.contains_key("AYA_LOGS");
    assert_eq!(has_log, cfg!(feature = "log-packets"));
}

#[cfg(feature = "log-packets")]
mod log_packets {
    use std::{io, sync::Mutex, time::Duration};

    use weir_common::{DropReason, metrics::outcome};

    use crate::{
        bed::{Bed, CLIENT, ETH0, SERVER, Verdict, device, for_both_families},
        packet::udp,
    };

    /// What the agent would have written to its log.
    static SAID: Mutex<String> = Mutex::new(String::new());

    struct Log;

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            *SAID.lock().unwrap() += std::str::from_utf8(bytes).unwrap();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_packet_has_a_line() {
        tracing_subscriber::fmt()
            .with_env_filter("weir_ebpf=debug")
            .with_ansi(false)
            .with_writer(|| Log)
            .init();
        for_both_families(send);
        let said = SAID.lock().unwrap();
        assert_eq!(said.lines().count(), 4, "{said}");
    }

    fn send(bed: &mut Bed) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let reader = bed.datapath.take_packet_log().unwrap();
            let good = bed.leaving(CLIENT, bed.pod(SERVER), udp(1000, 53));
            assert_eq!(bed.pod_sends(CLIENT, &good).verdict, Verdict::Local);
            let forged = bed.incoming(bed.pod(SERVER), bed.pod(CLIENT), udp(1000, 53));
            let dropped = Verdict::Dropped(DropReason::InvalidSource);
            assert_eq!(bed.wire_brings(&forged).verdict, dropped);

            let (kind, start) = if bed.is_v4() {
                ("800", "::ffff:10.1.0.")
            } else {
                ("86dd", "fd01::")
            };
            let line = |hook: u8, device: u32, outcome: u8, from: u32, to: u32| {
                format!(
                    "hook {hook} device {device} outcome {outcome}: {kind} {start}{from} 1000 > \
                     {start}{to} 53 protocol 17"
                )
            };
            let reason = DropReason::InvalidSource as u8;
            let both_said = async {
                said(line(0, device(CLIENT), outcome::LOCAL, CLIENT, SERVER)).await;
                said(line(2, ETH0, reason, SERVER, CLIENT)).await;
            };
            tokio::select! {
                () = reader => {}
                () = both_said => {}
            }
        });
    }

    async fn said(line: String) {
        let wait = async {
            while !SAID.lock().unwrap().contains(&line) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .is_err()
        {
            panic!("no line {line:?} in:\n{}", SAID.lock().unwrap());
        }
    }
}
