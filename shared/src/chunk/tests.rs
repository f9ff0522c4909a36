use std::convert::Infallible;
use std::io::{self, Read};

use fastcdc::v2020::FastCDC;
use proptest::prelude::*;

use super::cutter::WINDOW_BYTES;
use super::*;

/// Bytes that look random and are the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A reader that returns at most `step` bytes at a time.
struct Dribble<'a>(&'a [u8], usize);

impl Read for Dribble<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.1.min(buffer.len());
        self.0.read(&mut buffer[..len])
    }
}

fn cut(data: impl Read + Send) -> (CutContent, Vec<ChunkRef>, Vec<u8>) {
    let mut chunks = Vec::new();
    let mut bytes = Vec::new();
    let cut = Cutter::new()
        .cut(data, |chunk, data| {
            assert_eq!(ChunkRef::of(data), Some(chunk));
            chunks.push(chunk);
            bytes.extend_from_slice(data);
            Ok::<_, Infallible>(())
        })
        .unwrap();
    (cut, chunks, bytes)
}

fn over_the_whole_slice(data: &[u8]) -> Vec<u32> {
    FastCDC::new(data, MIN_CHUNK_BYTES, AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES)
        .map(|chunk| u32::try_from(chunk.length).unwrap())
        .collect()
}

#[test]
fn small_content_is_one_chunk_and_empty_content_none() {
    for (len, chunks) in [(0, 0), (1, 1), (SINGLE_CHUNK_BYTES - 1, 1), (SINGLE_CHUNK_BYTES, 1)] {
        let data = noise(1, len);
        let (content, found, bytes) = cut(data.as_slice());
        assert_eq!(found.len(), chunks, "{len} bytes");
        assert!(content.recipe.is_empty());
        assert_eq!(content.content, Digest::of(&data));
        assert_eq!(content.size, len as u64);
        assert_eq!(bytes, data);
        assert!(found.iter().all(|chunk| chunk.hash == content.content));
    }
}

#[test]
fn sizes_around_the_limits_are_cut_as_one_slice_would_be() {
    for around in
        [SINGLE_CHUNK_BYTES, MAX_CHUNK_BYTES, WINDOW_BYTES, WINDOW_BYTES + MAX_CHUNK_BYTES]
    {
        for len in [around - 1, around + 1, around] {
            if len <= SINGLE_CHUNK_BYTES {
                continue;
            }
            let data = noise(len as u64, len);
            let (content, chunks, bytes) = cut(data.as_slice());
            let lens: Vec<u32> = chunks.iter().map(|chunk| chunk.len).collect();
            assert_eq!(lens, over_the_whole_slice(&data), "{len} bytes");
            assert_eq!(bytes, data);
            if chunks.len() > 1 {
                assert_eq!(content.recipe.0, chunks);
            }
            content.recipe.check(content.size).unwrap();
        }
    }
}

#[test]
fn zeros_become_the_known_zero_chunk() {
    let (content, chunks, _) = cut(io::repeat(0).take(3 * MAX_CHUNK_BYTES as u64 + 7));
    assert_eq!(chunks.len(), 4);
    assert!(chunks[..3].iter().all(ChunkRef::is_zero));
    assert!(!chunks[3].is_zero());
    assert_eq!(content.recipe.0, chunks);
}

#[test]
fn an_insertion_at_the_front_keeps_the_later_chunks() {
    let data = noise(7, 16 * 1024 * 1024);
    let (_, before, _) = cut(data.as_slice());
    let (_, after, _) = cut([&b"x"[..], &data].concat().as_slice());
    let kept = after.iter().filter(|chunk| before.contains(chunk)).count();
    assert!(kept + 3 >= before.len(), "{kept} of {} chunks kept", before.len());
}

#[test]
fn chunks_of_an_earlier_version_are_found_again_wherever_they_stand() {
    let data = noise(8, 24 * 1024 * 1024);
    // Cut where no cut would be found: whoever finds these has not looked for one.
    let earlier = Recipe(data.chunks(700_000).filter_map(ChunkRef::of).collect());
    let again = |data: &[u8]| {
        let taker = |_, _: &[u8]| Ok::<_, Infallible>(());
        Cutter::new().cut_again(data, &earlier, taker).unwrap()
    };
    let same = again(&data);
    assert_eq!(same.recipe, earlier);
    assert_eq!(same.content, Digest::of(&data));
    // A change between two chunks: those after it are found once one of them is.
    let mut longer = data[..1_400_000].to_vec();
    longer.extend_from_slice(&data[700_000..]);
    let again = again(&longer);
    assert_eq!(again.content, Digest::of(&longer));
    assert_eq!(again.recipe.0[..2], earlier.0[..2]);
    again.recipe.check(longer.len() as u64).unwrap();
}

#[test]
fn what_ends_before_an_earlier_version_did_or_goes_on_after_it_is_cut_as_if_it_were_new() {
    let data = noise(9, 20 * 1024 * 1024);
    let (earlier, _, _) = cut(&data[..15 * 1024 * 1024]);
    for len in [data.len(), 15 * 1024 * 1024, 11 * 1024 * 1024, 9 * 1024 * 1024 + 1, 3_000_000] {
        let taker = |_, _: &[u8]| Ok::<_, Infallible>(());
        let again = Cutter::new().cut_again(&data[..len], &earlier.recipe, taker).unwrap();
        assert_eq!(again, cut(&data[..len]).0, "{len} bytes");
    }
}

#[test]
fn a_reader_that_fails_late_and_a_taker_that_refuses_late_end_the_cutting() {
    let data = noise(4, 40 * 1024 * 1024);
    struct Broken<'a>(&'a [u8]);
    impl Read for Broken<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() { Err(io::Error::other("broken")) } else { self.0.read(buffer) }
        }
    }
    let result = Cutter::new().cut(Broken(&data), |_, _| Ok::<_, Infallible>(()));
    assert!(matches!(result, Err(CutError::Read(_))));
    let mut seen = 0;
    let result = Cutter::new().cut(data.as_slice(), |_, _| {
        seen += 1;
        if seen == 12 { Err("enough") } else { Ok(()) }
    });
    assert!(matches!(result, Err(CutError::Taker("enough"))));
}

#[test]
fn taker_and_reader_errors_end_the_cutting() {
    let data = noise(3, 3 * MAX_CHUNK_BYTES);
    let mut seen = 0;
    let result = Cutter::new().cut(data.as_slice(), |_, _| {
        seen += 1;
        if seen == 2 { Err("enough") } else { Ok(()) }
    });
    assert!(matches!(result, Err(CutError::Taker("enough"))));
    assert_eq!(seen, 2);
}

#[test]
fn recipes_that_do_not_fit_the_content_are_refused() {
    let chunk = |len| ChunkRef { hash: Digest::ZERO, len };
    let max = u32::try_from(MAX_CHUNK_BYTES).unwrap();
    for (chunks, size, expected) in [
        (vec![], 0, Ok(())),
        (vec![], MAX_CHUNK_BYTES as u64, Ok(())),
        (vec![], MAX_CHUNK_BYTES as u64 + 1, Err(InvalidRecipe::Missing { size: 4_194_305 })),
        (vec![chunk(5)], 5, Err(InvalidRecipe::SingleChunk)),
        (vec![chunk(5), chunk(6)], 11, Ok(())),
        (vec![chunk(5), chunk(6)], 12, Err(InvalidRecipe::Sum { sum: 11, size: 12 })),
        (vec![chunk(5), chunk(0)], 5, Err(InvalidRecipe::ChunkSize { bytes: 0 })),
        (vec![chunk(max), chunk(max + 1)], 0, Err(InvalidRecipe::ChunkSize { bytes: max + 1 })),
    ] {
        let bytes = Recipe(chunks).encode();
        assert_eq!(Recipe::parse(&bytes, size).map(|_| ()), expected);
    }
    assert_eq!(Recipe::parse(&[0; 37], 1), Err(InvalidRecipe::Length { bytes: 37 }));
    let many = vec![0; (MAX_RECIPE_CHUNKS + 1) * CHUNK_REF_BYTES];
    let chunks = MAX_RECIPE_CHUNKS + 1;
    assert_eq!(Recipe::parse(&many, 1), Err(InvalidRecipe::TooManyChunks { chunks }));
}

#[test]
fn recipe_has_its_documented_bytes() {
    let recipe = Recipe(vec![
        ChunkRef { hash: Digest::from_bytes([0xab; 32]), len: 0x0001_0203 },
        ChunkRef { hash: Digest::from_bytes([0xcd; 32]), len: 1 },
    ]);
    let mut golden = vec![0xab; 32];
    golden.extend([0, 1, 2, 3]);
    golden.extend([0xcd; 32]);
    golden.extend([0, 0, 0, 1]);
    assert_eq!(recipe.encode(), golden);
    assert_eq!(Recipe::parse(&golden, 0x0001_0204), Ok(recipe));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn cuts_do_not_depend_on_windows_or_on_how_the_reader_returns(
        seed in any::<u64>(),
        len in SINGLE_CHUNK_BYTES + 1..14 * 1024 * 1024,
        zeros in 0..6 * 1024 * 1024_usize,
        step in 1000..3_000_000_usize,
    ) {
        let mut data = noise(seed, len);
        let at = len / 3;
        let end = (at + zeros).min(len);
        data[at..end].fill(0);
        let (content, chunks, bytes) = cut(Dribble(&data, step));
        let lens: Vec<u32> = chunks.iter().map(|chunk| chunk.len).collect();
        prop_assert_eq!(lens, over_the_whole_slice(&data));
        prop_assert!(bytes == data);
        prop_assert_eq!(content.content, Digest::of(&data));
        prop_assert_eq!(content.size, len as u64);
    }

    #[test]
    fn an_earlier_version_changes_no_cut(
        seed in any::<u64>(),
        len in SINGLE_CHUNK_BYTES..20 * 1024 * 1024,
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..3_000_usize, 0..2_000_000_usize), 0..4),
    ) {
        let data = noise(seed, len);
        let (earlier, _, _) = cut(data.as_slice());
        let mut edited = data;
        for (at, insert, remove) in edits {
            let at = at.index(edited.len());
            let end = (at + remove).min(edited.len());
            edited.splice(at..end, noise(seed ^ 1, insert));
            if edited.is_empty() {
                break;
            }
        }
        let again = Cutter::new()
            .cut_again(edited.as_slice(), &earlier.recipe, |_, _| Ok::<_, Infallible>(()))
            .unwrap();
        prop_assert_eq!(again, cut(edited.as_slice()).0);
    }

    #[test]
    fn recipes_survive_their_bytes(lens in prop::collection::vec(1..=4_194_304_u32, 2..50)) {
        let recipe = Recipe(
            lens.iter().map(|&len| ChunkRef { hash: Digest::of(&len.to_be_bytes()), len }).collect(),
        );
        let size = lens.iter().map(|&len| u64::from(len)).sum();
        prop_assert_eq!(Recipe::parse(&recipe.encode(), size), Ok(recipe));
    }
}
