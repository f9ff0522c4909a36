//! Compiles the protocol with a pure-Rust compiler, so that no `protoc` has to be installed.

const FILES: [&str; 8] = [
    "cortex/v1/common.proto",
    "cortex/v1/enroll.proto",
    "cortex/v1/task.proto",
    "cortex/v1/files.proto",
    "cortex/v1/node.proto",
    "cortex/v1/sync.proto",
    "cortex/v1/operator.proto",
    "cortex/v1/control.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    // For tests that have to know every method there is.
    let described = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("cortex.v1.bin");
    std::fs::write(described, protox::prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        // `Bytes` instead of `Vec<u8>`: a received message is sliced, not copied.
        .bytes(".")
        // A buffer of the size that a stream needs: see there.
        .codec_path("crate::codec::MeshCodec")
        .compile_fds(descriptors)?;
    Ok(())
}
