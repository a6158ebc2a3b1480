//! Compiles the kernel programs of the benchmark and leaves the object in `OUT_DIR/weir-bench-ebpf`.

use std::process::ExitCode;

#[path = "../ebpf/build/object.rs"]
mod object;

fn main() -> ExitCode {
    let object = object::Object {
        package: "weir-bench-ebpf",
        target: "bpf-bench",
        inputs: &["bench/ebpf"],
        features: &[],
    };
    match object.compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
