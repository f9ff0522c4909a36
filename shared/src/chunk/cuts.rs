//! Where FastCDC (2020) cuts, looked for in several places at once.
//!
//! The hash that decides about a cut is made of the 64 bytes before it and of no others, and each step of
//! it waits for the one before. So a stretch of the content is divided into lanes whose hashes do not
//! wait for one another: that is about twice as fast, and the cuts are the same.

use std::sync::LazyLock;

use fastcdc::v2020::{Normalization, get_gear_with_seed, select_masks};

use super::{AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES};

/// Bytes that a hash is made of, at most.
const REACH: usize = 64;
/// Bytes of one lane before the lanes are compared: a cut in the first of them makes those of the others
/// useless.
const LANE_BYTES: usize = 4096;

static FINDER: LazyLock<Finder> = LazyLock::new(|| {
    let (gear, _) = get_gear_with_seed(0);
    let gear = <[u64; 256]>::try_from(&*gear).expect("a byte has 256 values");
    let (strict, relaxed) = select_masks(AVERAGE_CHUNK_BYTES, Normalization::Level1);
    Finder { gear, strict, relaxed }
});

struct Finder {
    gear: [u64; 256],
    /// What has to be zero in the hash below the average size, and above it.
    strict: u64,
    relaxed: u64,
}

/// Where the first chunk of `data` ends, which is either the rest of the content or at least
/// [`MAX_CHUNK_BYTES`] of it: FastCDC looks no further.
pub(super) fn first_cut(data: &[u8]) -> usize {
    if data.len() <= MIN_CHUNK_BYTES {
        return data.len();
    }
    let data = &data[..data.len().min(MAX_CHUNK_BYTES)];
    let center = data.len().min(AVERAGE_CHUNK_BYTES);
    // FastCDC takes two bytes at a time: the last one of an odd number makes no cut.
    let even = |position: usize| position - position % 2;
    FINDER
        .find(data, MIN_CHUNK_BYTES, even(center), FINDER.strict)
        .or_else(|| FINDER.find(data, even(center), even(data.len()), FINDER.relaxed))
        .unwrap_or(data.len())
}

impl Finder {
    /// The first cut in a part of the data.
    fn find(&self, data: &[u8], from: usize, to: usize, mask: u64) -> Option<usize> {
        let mut at = from;
        while to - at >= 4 * LANE_BYTES {
            if let Some(cut) = self.find_in_lanes(data, at, mask) {
                return Some(cut);
            }
            at += 4 * LANE_BYTES;
        }
        let mut hash = self.hash_before(data, at);
        (at..to).find(|&at| {
            hash = self.step(hash, data[at]);
            hash & mask == 0
        })
    }

    /// The same in four lanes side by side, of which the first begins at `from`.
    fn find_in_lanes(&self, data: &[u8], from: usize, mask: u64) -> Option<usize> {
        let begin = |lane: usize| from + lane * LANE_BYTES;
        let (lanes, _) = data[from..begin(4)].as_chunks::<LANE_BYTES>();
        let [a, b, c, d] = lanes else { unreachable!("there are four") };
        let [mut h, mut i, mut j, mut k] =
            [0, 1, 2, 3].map(|lane| self.hash_before(data, begin(lane)));
        // In each lane the first cut.
        let mut cuts = [None; 4];
        for at in 0..LANE_BYTES {
            h = self.step(h, a[at]);
            i = self.step(i, b[at]);
            j = self.step(j, c[at]);
            k = self.step(k, d[at]);
            if h & mask == 0 {
                return Some(begin(0) + at);
            }
            if i & mask == 0 {
                cuts[1] = cuts[1].or(Some(begin(1) + at));
            }
            if j & mask == 0 {
                cuts[2] = cuts[2].or(Some(begin(2) + at));
            }
            if k & mask == 0 {
                cuts[3] = cuts[3].or(Some(begin(3) + at));
            }
        }
        cuts.into_iter().flatten().next()
    }

    /// The hash of what lies before a position: FastCDC begins it where a chunk may end.
    fn hash_before(&self, data: &[u8], position: usize) -> u64 {
        let begin = position.saturating_sub(REACH).max(MIN_CHUNK_BYTES);
        data[begin..position].iter().fold(0, |hash, byte| self.step(hash, *byte))
    }

    #[inline]
    fn step(&self, hash: u64, byte: u8) -> u64 {
        (hash << 1).wrapping_add(self.gear[usize::from(byte)])
    }
}

#[cfg(test)]
mod tests {
    use fastcdc::v2020::FastCDC;
    use proptest::prelude::*;

    use super::*;

    fn reference(data: &[u8]) -> usize {
        FastCDC::new(data, MIN_CHUNK_BYTES, AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES)
            .cut(0, data.len())
            .1
    }

    #[test]
    fn sizes_around_the_limits_are_cut_as_fastcdc_cuts_them() {
        // Few cuts are found in it, so that the limits count.
        let data = [b"abcdefg".repeat(200_000), vec![7; 4_000_000]].concat();
        let around = [MIN_CHUNK_BYTES, AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES];
        let lanes = [MIN_CHUNK_BYTES + 4 * LANE_BYTES, AVERAGE_CHUNK_BYTES + 4 * LANE_BYTES];
        for size in around.into_iter().chain(lanes) {
            for len in size - 3..=size + 3 {
                assert_eq!(first_cut(&data[..len]), reference(&data[..len]), "{len}");
            }
        }
        assert_eq!(first_cut(&[]), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn cuts_are_those_of_fastcdc(
            seed in any::<[u8; 32]>(),
            len in 0..5_000_000_usize,
            values in prop::sample::select(vec![2_u8, 16, 255]),
        ) {
            let mut data = vec![0; len];
            blake3::Hasher::new().update(&seed).finalize_xof().fill(&mut data);
            data.iter_mut().for_each(|byte| *byte %= values);
            let mut rest = data.as_slice();
            while !rest.is_empty() {
                let cut = first_cut(rest);
                prop_assert_eq!(cut, reference(rest));
                rest = &rest[cut..];
            }
        }
    }
}
