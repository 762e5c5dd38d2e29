//! Random changes of inputs, of the kinds that break parsers.

use rand::Rng;
use rand::rngs::SmallRng;

/// Maximum length of a mutated input, in bytes.
const MAX_BYTES: usize = 8 << 10;

/// Maximum number of changes of one input.
const MAX_CHANGES: u32 = 4;

/// Texts with a meaning in one of the formats, and numbers at the limits of their types.
const TEXTS: [&[u8]; 30] = [
    b"\n\n",
    b"\r\n",
    b"\r",
    b"data: ",
    b"event: error\n",
    b"[DONE]",
    b"null",
    b"true",
    b"[",
    b"{",
    b"]",
    b"}",
    b"\"",
    b"\\",
    b"\\ud800",
    b",",
    b":",
    b"-1",
    b"0",
    b"0.5",
    b"1e308",
    b"4294967295",
    b"4294967296",
    b"18446744073709551615",
    b"\xff",
    b"\xef\xbb\xbf",
    b"--x7\r\n",
    b",ranks=1024",
    b",kv-events=bind:tcp://*:65535",
    b",replay=ipc://a",
];

/// Returns one of the inputs, of which there must be at least one, with a few random changes.
pub(crate) fn mutate(inputs: &[Vec<u8>], random: &mut SmallRng) -> Vec<u8> {
    let mut input = inputs[random.random_range(0..inputs.len())].clone();
    for _ in 0..random.random_range(1..=MAX_CHANGES) {
        change(&mut input, inputs, random);
        input.truncate(MAX_BYTES);
    }
    input
}

/// Changes an input at a random position.
fn change(input: &mut Vec<u8>, inputs: &[Vec<u8>], random: &mut SmallRng) {
    let start = random.random_range(0..=input.len());
    let end = (start + random.random_range(0..32)).min(input.len());
    match random.random_range(0..7) {
        0 => input.truncate(start),
        1 => drop(input.drain(start..end)),
        2 => {
            let repeated = input[start..end].repeat(random.random_range(1..4));
            input.splice(end..end, repeated);
        }
        3 => {
            let text = TEXTS[random.random_range(0..TEXTS.len())];
            input.splice(start..start, text.iter().copied());
        }
        4 => {
            let text = TEXTS[random.random_range(0..TEXTS.len())];
            input.splice(number_at(input, start), text.iter().copied());
        }
        5 => {
            let other = &inputs[random.random_range(0..inputs.len())];
            let from = random.random_range(0..=other.len());
            input.truncate(start);
            input.extend_from_slice(&other[from..]);
        }
        _ => {
            if let Some(byte) = input.get_mut(start) {
                *byte ^= 1 << random.random_range(0..8);
            }
        }
    }
}

/// Returns the position of the first number from `start` on; the empty range at the end if there is
/// none.
fn number_at(input: &[u8], start: usize) -> std::ops::Range<usize> {
    let is_digit = |&byte: &u8| byte.is_ascii_digit();
    let first = input[start..].iter().position(is_digit);
    let first = first.map_or(input.len(), |offset| start + offset);
    let digits = input[first..].iter().take_while(|byte| is_digit(byte));
    first..first + digits.count()
}
