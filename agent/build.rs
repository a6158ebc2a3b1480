//! Compiles the kernel programs and leaves the object in `OUT_DIR/weir-ebpf`, from where the
//! agent embeds it. `WEIR_EBPF_OBJECT=FILE` uses a ready object instead.

use std::{env, path::Path, process::ExitCode};

#[path = "../ebpf/build/object.rs"]
mod object;

const READY_OBJECT: &str = "WEIR_EBPF_OBJECT";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    println!("cargo::rerun-if-env-changed={READY_OBJECT}");
    let log_packets = env::var_os("CARGO_FEATURE_LOG_PACKETS").is_some();
    let object = object::Object {
        package: "weir-ebpf",
        target: "bpf",
        inputs: &["ebpf/Cargo.toml", "ebpf/src"],
        features: if log_packets { &["log-packets"] } else { &[] },
    };
    match env::var_os(READY_OBJECT).filter(|value| !value.is_empty()) {
        Some(ready) => {
            let ready = Path::new(&ready);
            println!("cargo::rerun-if-changed={}", ready.display());
            object.take(ready)
        }
        None => object.compile(),
    }
}
