//! Generates the gRPC client and server from `proto/weir.proto`, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/weir.proto");
    let files = protox::compile(["weir.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .message_attribute(
            ".",
            r#"#[cfg_attr(feature = "serde", derive(serde::Serialize))]"#,
        )
        .compile_fds(files)?;
    Ok(())
}
