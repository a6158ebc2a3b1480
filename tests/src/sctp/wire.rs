//! SCTP packets as they stand on the wire (RFC 9260 section 3): headers, chunks and the CRC. Only what the
//! client and server beside need.

use anyhow::{Context as _, Result, ensure};
use crc::{CRC_32_ISCSI, Crc};

/// CRC32c, RFC 9260 appendix A.
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// Types of chunks, RFC 9260 section 3.2.
pub mod kind {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const SACK: u8 = 3;
    pub const ABORT: u8 = 6;
    pub const COOKIE_ECHO: u8 = 10;
    pub const COOKIE_ACK: u8 = 11;
}

/// Parameter of INIT ACK: the cookie.
pub const STATE_COOKIE: u16 = 7;
/// Flags of DATA: first and last fragment of its message.
const WHOLE_MESSAGE: u8 = 0b11;
/// Flag of ABORT: the tag is that of the packet that it answers.
pub const REFLECTED_TAG: u8 = 1;
/// Receiver's window, bytes.
const WINDOW: u32 = 65_536;

/// A chunk without its header.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chunk {
    pub kind: u8,
    pub flags: u8,
    pub value: Vec<u8>,
}

impl Chunk {
    pub const fn new(kind: u8, value: Vec<u8>) -> Self {
        Self {
            kind,
            flags: 0,
            value,
        }
    }

    /// INIT or INIT ACK.
    pub fn init(kind: u8, tag: u32, first: u32, parameters: &[u8]) -> Self {
        let mut value = [tag, WINDOW].map(u32::to_be_bytes).concat();
        // One stream each way.
        value.extend([0, 1, 0, 1]);
        value.extend(first.to_be_bytes());
        value.extend(parameters);
        Self::new(kind, value)
    }

    /// A whole message in stream 0.
    pub fn data(sequence: u32, message: &[u8]) -> Self {
        let mut value = sequence.to_be_bytes().to_vec();
        value.extend([0; 8]);
        value.extend(message);
        Self {
            kind: kind::DATA,
            flags: WHOLE_MESSAGE,
            value,
        }
    }

    /// Everything up to `sequence` has arrived.
    pub fn sack(sequence: u32) -> Self {
        let mut value = [sequence, WINDOW].map(u32::to_be_bytes).concat();
        value.extend([0; 4]);
        Self::new(kind::SACK, value)
    }

    /// The word that stands `at` bytes into the value.
    pub fn word(&self, at: usize) -> Result<u32> {
        let bytes = self.value.get(at..at + 4);
        let bytes = bytes.with_context(|| format!("a chunk {} is too short", self.kind))?;
        Ok(u32::from_be_bytes(bytes.try_into()?))
    }

    /// The cookie of an INIT ACK that has no other parameter.
    pub fn cookie(&self) -> Result<&[u8]> {
        let parameter = self.value.get(16..).unwrap_or_default();
        let cookie = parameter.strip_prefix(&STATE_COOKIE.to_be_bytes());
        let cookie = cookie.and_then(|rest| rest.get(2..));
        cookie.context("an INIT ACK without a cookie")
    }

    /// The message of a DATA chunk.
    pub fn message(&self) -> Result<&[u8]> {
        self.value.get(12..).context("a DATA chunk is too short")
    }
}

/// A packet without its checksum.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Packet {
    pub source: u16,
    pub destination: u16,
    pub tag: u32,
    pub chunks: Vec<Chunk>,
}

impl Packet {
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = [self.source, self.destination]
            .map(u16::to_be_bytes)
            .concat();
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        for chunk in &self.chunks {
            bytes.extend([chunk.kind, chunk.flags]);
            bytes.extend(u16::try_from(4 + chunk.value.len())?.to_be_bytes());
            bytes.extend(&chunk.value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let sum = CRC.checksum(&bytes).to_le_bytes();
        bytes[8..12].copy_from_slice(&sum);
        Ok(bytes)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        ensure!(
            bytes.len() >= 12,
            "{} bytes are no SCTP packet",
            bytes.len()
        );
        let (header, mut rest) = bytes.split_at(12);
        let mut summed = bytes.to_vec();
        summed[8..12].fill(0);
        let (found, right) = (&header[8..], CRC.checksum(&summed).to_le_bytes());
        ensure!(found == right, "the CRC is {found:x?}, not {right:x?}");
        let mut chunks = Vec::new();
        while let [kind, flags, high, low, ..] = *rest {
            let length = usize::from(u16::from_be_bytes([high, low]));
            let value = rest.get(4..length).context("a chunk of a wrong length")?;
            chunks.push(Chunk {
                kind,
                flags,
                value: value.to_vec(),
            });
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(Self {
            source: u16::from_be_bytes([header[0], header[1]]),
            destination: u16::from_be_bytes([header[2], header[3]]),
            tag: u32::from_be_bytes(header[4..8].try_into()?),
            chunks,
        })
    }

    pub fn chunk(&self, kind: u8) -> Option<&Chunk> {
        self.chunks.iter().find(|chunk| chunk.kind == kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive_the_wire_and_changed_ones_do_not() {
        let packet = Packet {
            source: 1,
            destination: 2,
            tag: 3,
            chunks: vec![Chunk::sack(4), Chunk::data(5, b"six")],
        };
        let bytes = packet.encode().expect("short enough");
        assert_eq!(Packet::decode(&bytes).expect("right"), packet);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            Packet::decode(&changed).expect_err("a bit was changed");
        }
    }

    /// The test vectors of RFC 3720 appendix B.4, as they stand on the wire.
    #[test]
    fn the_crc_is_that_of_the_standard() {
        let sum = |bytes: &[u8]| CRC.checksum(bytes).to_le_bytes();
        assert_eq!(sum(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(sum(&[0xff; 32]), [0x43, 0xab, 0xa8, 0x62]);
    }
}
