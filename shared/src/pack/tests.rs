use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::chunk::ChunkRef;
use crate::entry::Digest;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn pack_of(chunks: &[Vec<u8>]) -> Bytes {
    let mut builder = PackBuilder::new(1).unwrap();
    for chunk in chunks {
        assert_ne!(builder.push(ChunkRef::of(chunk).unwrap(), chunk), Pushed::Full);
    }
    builder.finish().unwrap().1
}

/// Sets the trailer right after a change, as a hostile sender would.
fn resealed(mut bytes: Vec<u8>) -> Bytes {
    let body = bytes.len() - TRAILER_BYTES;
    let hash = Digest::of(&bytes[..body]);
    bytes[body..].copy_from_slice(hash.as_bytes());
    bytes.into()
}

/// Parses and verifies; what a receiver does.
fn receive(bytes: Bytes) -> Result<Pack, InvalidPack> {
    let pack = Pack::parse(bytes)?;
    pack.verify()?;
    Ok(pack)
}

#[test]
fn an_incompressible_chunk_of_the_largest_size_makes_a_pack_below_the_limit() {
    let chunk = noise(1, MAX_RAW_BYTES);
    let bytes = pack_of(std::slice::from_ref(&chunk));
    assert_eq!(
        bytes.len(),
        MAX_RAW_BYTES + HEADER_BYTES + FRAME_BYTES + INDEX_BYTES + TRAILER_BYTES
    );
    let pack = receive(bytes).unwrap();
    assert_eq!(pack.chunk(&Digest::of(&chunk)).unwrap().unwrap(), chunk);
}

#[test]
fn the_largest_number_of_incompressible_chunks_stays_below_the_limit() {
    let mut builder = PackBuilder::new(3).unwrap();
    let mut seed = 0;
    loop {
        let chunk = noise(seed, MAX_RAW_BYTES / MAX_CHUNKS);
        if builder.push(ChunkRef::of(&chunk).unwrap(), &chunk) == Pushed::Full {
            break;
        }
        seed += 1;
    }
    assert_eq!(usize::try_from(seed).unwrap(), MAX_CHUNKS);
    assert_eq!(builder.raw_bytes(), MAX_RAW_BYTES);
    let (hash, bytes) = builder.finish().unwrap();
    assert!(bytes.len() <= MAX_ENCODED_BYTES);
    let pack = receive(bytes).unwrap();
    assert_eq!(pack.hash(), hash);
    assert_eq!(pack.index().len(), MAX_CHUNKS);
    assert!(builder.is_empty() && builder.finish().is_none());
}

#[test]
fn text_is_compressed_across_small_chunks() {
    let chunks: Vec<Vec<u8>> =
        (0..500).map(|n| format!("fn number_{n}() -> u32 {{ {n} }}\n").into_bytes()).collect();
    let raw: usize = chunks.iter().map(Vec::len).sum();
    let bytes = pack_of(&chunks);
    let tables = HEADER_BYTES + FRAME_BYTES + INDEX_BYTES * 500 + TRAILER_BYTES;
    assert!((bytes.len() - tables) * 4 < raw, "{} of {raw}", bytes.len() - tables);
    receive(bytes).unwrap();
}

#[test]
fn a_chunk_is_pushed_once_and_a_full_pack_says_so() {
    let mut builder = PackBuilder::new(1).unwrap();
    let chunk = noise(5, 3_000_000);
    let chunk_ref = ChunkRef::of(&chunk).unwrap();
    assert_eq!(builder.push(chunk_ref, &chunk), Pushed::Added);
    assert_eq!(builder.push(chunk_ref, &chunk), Pushed::Duplicate);
    let other = noise(6, 2_000_000);
    let other_ref = ChunkRef::of(&other).unwrap();
    assert_eq!(builder.push(other_ref, &other), Pushed::Full);
    let (_, first) = builder.finish().unwrap();
    assert_eq!(builder.push(other_ref, &other), Pushed::Added);
    let (_, second) = builder.finish().unwrap();
    assert!(receive(first).unwrap().contains(&chunk_ref.hash));
    assert!(receive(second).unwrap().contains(&other_ref.hash));
}

#[test]
fn a_pack_has_its_documented_bytes() {
    let bytes = pack_of(&[b"ab".to_vec(), b"c".to_vec()]);
    let mut golden = b"CXPK\x01\0\0\0\0\0\0\x01\0\0\0\x02".to_vec();
    golden.extend(b"abc");
    golden.extend(b"\0\0\0\0\x03\0\0\0\x03");
    golden.extend(Digest::of(b"ab").as_bytes());
    golden.extend(b"\0\0\0\0\0\0\0\0\0\0\0\x02");
    golden.extend(Digest::of(b"c").as_bytes());
    golden.extend(b"\0\0\0\0\0\0\0\x02\0\0\0\x01");
    golden.extend(*Digest::of(&golden).as_bytes());
    assert_eq!(bytes, golden);
}

#[test]
fn structures_that_lie_are_refused_though_their_checksum_is_right() {
    let honest = pack_of(&[b"ab".to_vec(), b"c".to_vec()]).to_vec();
    let table = HEADER_BYTES + 3;
    let index = table + FRAME_BYTES;
    for (what, at, value) in [
        ("magic", 0, 0),
        ("version", 4, 2),
        ("reserved", 6, 1),
        ("more frames than chunks", 11, 3),
        ("frame count does not fit the tables", 11, 2),
        ("no frame", 11, 0),
        ("huge frame count", 8, 255),
        ("no chunk", 15, 0),
        ("more chunks than the index has", 15, 3),
        ("huge chunk count", 12, 255),
        ("unknown codec", table, 7),
        ("not zstd", table, CODEC_ZSTD),
        ("stored length", table + 4, 2),
        ("huge stored length", table + 1, 255),
        ("raw length", table + 8, 4),
        ("huge raw length", table + 5, 255),
        ("frame of a chunk", index + 35, 1),
        ("overlap", index + INDEX_BYTES + 39, 1),
        ("gap", index + INDEX_BYTES + 39, 3),
        ("empty chunk", index + INDEX_BYTES + 43, 0),
        ("chunk beyond its frame", index + INDEX_BYTES + 43, 2),
        ("hash", index, honest[index] ^ 1),
        ("content", HEADER_BYTES, b'x'),
    ] {
        let mut bytes = honest.clone();
        assert_ne!(bytes[at], value, "{what}");
        bytes[at] = value;
        assert!(receive(resealed(bytes)).is_err(), "{what}");
    }
    let mut twice = honest.clone();
    twice.copy_within(index..index + 32, index + INDEX_BYTES);
    assert!(matches!(receive(resealed(twice)), Err(InvalidPack::Duplicate { .. })));
}

#[test]
fn a_decompression_bomb_is_not_unpacked() {
    // 100 MiB of zeros in a frame that claims 4 MiB.
    let bomb = zstd::bulk::compress(&vec![0; 100 << 20], 1).unwrap();
    let chunk = ChunkRef { hash: Digest::of(&vec![0; MAX_RAW_BYTES]), len: 4 << 20 };
    let mut bytes = b"CXPK\x01\0\0\0\0\0\0\x01\0\0\0\x01".to_vec();
    bytes.extend(&bomb);
    bytes.push(CODEC_ZSTD);
    bytes.extend(u32::try_from(bomb.len()).unwrap().to_be_bytes());
    bytes.extend(chunk.len.to_be_bytes());
    bytes.extend(chunk.hash.as_bytes());
    bytes.extend([0; 8]);
    bytes.extend(chunk.len.to_be_bytes());
    bytes.extend([0; TRAILER_BYTES]);
    let pack = Pack::parse(resealed(bytes)).unwrap();
    assert_eq!(pack.verify(), Err(InvalidPack::Compression { frame: 0 }));
    assert!(pack.chunk(&chunk.hash).is_err());
}

fn any_chunks() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let chunk = prop_oneof![
        6 => (any::<u64>(), 1..5_000_usize).prop_map(|(seed, len)| noise(seed, len)),
        3 => (any::<u8>(), 1..200_000_usize).prop_map(|(byte, len)| vec![byte; len]),
        1 => (any::<u64>(), 1..1_200_000_usize).prop_map(|(seed, len)| noise(seed, len)),
    ];
    prop::collection::vec(chunk, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chunks_survive_packing(chunks in any_chunks(), level in 1..4) {
        let mut builder = PackBuilder::new(level).unwrap();
        let mut packs = Vec::new();
        for chunk in &chunks {
            let chunk_ref = ChunkRef::of(chunk).unwrap();
            if builder.push(chunk_ref, chunk) == Pushed::Full {
                packs.push(builder.finish().unwrap());
                prop_assert_eq!(builder.push(chunk_ref, chunk), Pushed::Added);
            }
        }
        packs.extend(builder.finish());
        let mut found = std::collections::HashMap::new();
        for (hash, bytes) in packs {
            prop_assert!(bytes.len() <= MAX_ENCODED_BYTES);
            let pack = Pack::parse(bytes).unwrap();
            prop_assert_eq!(pack.hash(), hash);
            let mut raw = 0;
            pack.for_each_chunk(|chunk, data| {
                raw += u64::from(chunk.len);
                found.insert(chunk.hash, data.to_vec());
            }).unwrap();
            prop_assert_eq!(raw, pack.raw_bytes());
            for indexed in pack.index() {
                let data = pack.chunk(&indexed.chunk.hash).unwrap().unwrap();
                prop_assert_eq!(&data, &found[&indexed.chunk.hash]);
            }
        }
        for chunk in &chunks {
            prop_assert_eq!(&found[&Digest::of(chunk)], chunk);
        }
    }

    #[test]
    fn a_changed_or_missing_byte_is_never_accepted(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..6),
        at in any::<prop::sample::Index>(),
        flip in 1..=255_u8,
    ) {
        let bytes = pack_of(&chunks);
        let at = at.index(bytes.len());
        let mut changed = bytes.to_vec();
        changed[at] ^= flip;
        prop_assert!(Pack::parse(changed.into()).is_err());
        prop_assert!(Pack::parse(bytes.slice(..at)).is_err());
        let longer: Vec<u8> = bytes.iter().copied().chain([flip]).collect();
        prop_assert!(Pack::parse(longer.into()).is_err());
    }

    /// Whatever a sender writes and seals: no panic, and what is accepted is what it says.
    #[test]
    fn a_resealed_mutation_is_refused_or_true(
        chunks in prop::collection::vec(prop::collection::vec(0..4_u8, 1..300), 1..6),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = pack_of(&chunks).to_vec();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()).max(TRAILER_BYTES));
        }
        if let Ok(pack) = receive(resealed(bytes)) {
            pack.for_each_chunk(|chunk, data| {
                assert_eq!(ChunkRef::of(data), Some(chunk));
            }).unwrap();
        }
    }
}
