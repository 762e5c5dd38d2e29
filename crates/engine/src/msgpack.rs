//! A MessagePack reader for untrusted bytes.
//!
//! The format is one table of markers, and no crate has a reader with all the properties needed
//! here: values are borrowed from the input, unneeded values are skipped without recursion, and a
//! header that claims four billion elements costs nothing, because lengths are checked against the
//! bytes that are left.

/// The error for bytes that are not MessagePack, end too early, or do not have the requested type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// One value, or the header of an array or map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value<'p> {
    Nil,
    Bool,
    Unsigned(u64),
    /// A number below 0; others are `Unsigned`, however they were encoded.
    Negative(i64),
    Float(f64),
    /// Text, whose UTF-8 is not checked.
    Text(&'p [u8]),
    Bytes(&'p [u8]),
    Extension,
    /// The header of an array, with the number of values that follow.
    Array(u32),
    /// The header of a map, with the number of pairs of values that follow.
    Map(u32),
}

/// A reader at a position in a slice. A copy of it keeps that position for a later return.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'p> {
    rest: &'p [u8],
}

impl<'p> Reader<'p> {
    /// Creates a reader at the start of `bytes`.
    pub(crate) fn new(bytes: &'p [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Returns the number of unread bytes, which also bounds the number of values in them.
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Reads one value; of an array or map only the header, whose length is not compared with the
    /// unread bytes. After an error the position is undefined.
    #[inline]
    pub(crate) fn next(&mut self) -> Result<Value<'p>, Malformed> {
        let [marker] = self.take()?;
        Ok(match marker {
            0x00..=0x7f => Value::Unsigned(u64::from(marker)),
            0x80..=0x8f => Value::Map(u32::from(marker & 0x0f)),
            0x90..=0x9f => Value::Array(u32::from(marker & 0x0f)),
            0xa0..=0xbf => Value::Text(self.slice(u32::from(marker & 0x1f))?),
            0xc0 => Value::Nil,
            // Never used, according to the specification.
            0xc1 => return Err(Malformed),
            0xc2 | 0xc3 => Value::Bool,
            0xc4 => Value::Bytes(self.sized8()?),
            0xc5 => Value::Bytes(self.sized16()?),
            0xc6 => Value::Bytes(self.sized32()?),
            // An extension has a type byte between its length and its content.
            0xc7 => self.extension(Self::u8)?,
            0xc8 => self.extension(Self::u16)?,
            0xc9 => self.extension(Self::u32)?,
            0xca => Value::Float(f64::from(f32::from_be_bytes(self.take()?))),
            0xcb => Value::Float(f64::from_be_bytes(self.take()?)),
            0xcc => Value::Unsigned(u64::from(u8::from_be_bytes(self.take()?))),
            0xcd => Value::Unsigned(u64::from(u16::from_be_bytes(self.take()?))),
            0xce => Value::Unsigned(u64::from(u32::from_be_bytes(self.take()?))),
            0xcf => Value::Unsigned(u64::from_be_bytes(self.take()?)),
            0xd0 => signed(i64::from(i8::from_be_bytes(self.take()?))),
            0xd1 => signed(i64::from(i16::from_be_bytes(self.take()?))),
            0xd2 => signed(i64::from(i32::from_be_bytes(self.take()?))),
            0xd3 => signed(i64::from_be_bytes(self.take()?)),
            0xd4..=0xd8 => self.extension(|_| Ok(1 << (marker - 0xd4)))?,
            0xd9 => Value::Text(self.sized8()?),
            0xda => Value::Text(self.sized16()?),
            0xdb => Value::Text(self.sized32()?),
            0xdc => Value::Array(self.u16()?),
            0xdd => Value::Array(self.u32()?),
            0xde => Value::Map(self.u16()?),
            0xdf => Value::Map(self.u32()?),
            0xe0..=0xff => Value::Negative(i64::from(i8::from_be_bytes([marker]))),
        })
    }

    /// Returns the value that [`Self::next`] would read, without reading it.
    pub(crate) fn peek(&self) -> Result<Value<'p>, Malformed> {
        let mut ahead = *self;
        ahead.next()
    }

    /// Reads one value and skips the values inside it.
    #[inline]
    pub(crate) fn next_skipping_children(&mut self) -> Result<Value<'p>, Malformed> {
        let value = self.next()?;
        match value {
            Value::Array(length) => self.skip_values(u64::from(length))?,
            Value::Map(length) => self.skip_values(2 * u64::from(length))?,
            _ => {}
        }
        Ok(value)
    }

    /// Skips one value and all values inside it. The time is bounded by the number of bytes, for
    /// any nesting and any lengths in headers.
    #[inline]
    pub(crate) fn skip(&mut self) -> Result<(), Malformed> {
        self.next_skipping_children().map(|_| ())
    }

    /// Skips `pending` values and all values inside them. Fails at once if fewer bytes than pending
    /// values are left.
    fn skip_values(&mut self, mut pending: u64) -> Result<(), Malformed> {
        while pending > 0 {
            // Each value has at least one byte.
            if pending > self.rest.len() as u64 {
                return Err(Malformed);
            }
            pending -= 1;
            match self.next()? {
                Value::Array(length) => pending += u64::from(length),
                Value::Map(length) => pending += 2 * u64::from(length),
                _ => {}
            }
        }
        Ok(())
    }

    /// Skips one value and returns its bytes.
    pub(crate) fn raw(&mut self) -> Result<&'p [u8], Malformed> {
        let before = self.rest;
        self.skip()?;
        let (value, _) = before
            .split_at_checked(before.len() - self.rest.len())
            .ok_or(Malformed)?;
        Ok(value)
    }

    /// Reads the header of an array, or nil as `None`. The returned length is at most the number of
    /// unread bytes, so memory for that many values may be reserved.
    pub(crate) fn array_or_nil(&mut self) -> Result<Option<usize>, Malformed> {
        match self.next()? {
            Value::Nil => Ok(None),
            Value::Array(length) => usize::try_from(length)
                .ok()
                .filter(|&length| length <= self.rest.len())
                .map(Some)
                .ok_or(Malformed),
            _ => Err(Malformed),
        }
    }

    /// Reads text, or nil as `None`.
    pub(crate) fn text_or_nil(&mut self) -> Result<Option<&'p str>, Malformed> {
        match self.next()? {
            Value::Nil => Ok(None),
            Value::Text(text) => str::from_utf8(text).map(Some).map_err(|_| Malformed),
            _ => Err(Malformed),
        }
    }

    /// Reads a number that fits into 32 bits, or nil as `None`.
    pub(crate) fn u32_or_nil(&mut self) -> Result<Option<u32>, Malformed> {
        match self.next()? {
            Value::Nil => Ok(None),
            Value::Unsigned(number) => u32::try_from(number).map(Some).map_err(|_| Malformed),
            _ => Err(Malformed),
        }
    }

    /// Appends up to `max_count` numbers from 0 to 2³²−1 to `into`, and stops at the first other
    /// value. Returns how many it read. Most values of an event are token ids, so only their four
    /// encodings are checked here.
    #[inline]
    pub(crate) fn u32_run(&mut self, max_count: usize, into: &mut Vec<u32>) -> usize {
        let mut rest = self.rest;
        let mut count = 0;
        while count < max_count {
            let (number, after) = match rest {
                [0xcd, a, b, after @ ..] => (u32::from(u16::from_be_bytes([*a, *b])), after),
                [0xce, a, b, c, d, after @ ..] => (u32::from_be_bytes([*a, *b, *c, *d]), after),
                [small @ 0x00..=0x7f, after @ ..] => (u32::from(*small), after),
                [0xcc, a, after @ ..] => (u32::from(*a), after),
                _ => break,
            };
            into.push(number);
            rest = after;
            count += 1;
        }
        self.rest = rest;
        count
    }

    #[inline]
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Malformed)?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline]
    fn slice(&mut self, length: u32) -> Result<&'p [u8], Malformed> {
        let length = usize::try_from(length).map_err(|_| Malformed)?;
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from(u8::from_be_bytes(self.take()?)))
    }

    fn u16(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from(u16::from_be_bytes(self.take()?)))
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.take()?))
    }

    /// Reads a one-byte length and as many bytes.
    fn sized8(&mut self) -> Result<&'p [u8], Malformed> {
        let length = self.u8()?;
        self.slice(length)
    }

    /// Reads a two-byte length and as many bytes.
    fn sized16(&mut self) -> Result<&'p [u8], Malformed> {
        let length = self.u16()?;
        self.slice(length)
    }

    /// Reads a four-byte length and as many bytes.
    fn sized32(&mut self) -> Result<&'p [u8], Malformed> {
        let length = self.u32()?;
        self.slice(length)
    }

    /// Skips an extension whose length `length` reads.
    fn extension(
        &mut self,
        length: impl FnOnce(&mut Self) -> Result<u32, Malformed>,
    ) -> Result<Value<'p>, Malformed> {
        let length = length(self)?;
        let _type: [u8; 1] = self.take()?;
        self.slice(length)?;
        Ok(Value::Extension)
    }
}

/// Returns the value of a number in a signed encoding, which may be nonnegative.
fn signed(number: i64) -> Value<'static> {
    u64::try_from(number).map_or(Value::Negative(number), Value::Unsigned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn skipped(bytes: &[u8]) -> Option<usize> {
        let mut reader = Reader::new(bytes);
        reader.skip().ok()?;
        Some(bytes.len() - reader.remaining())
    }

    fn skipped_by_rmpv(bytes: &[u8]) -> Option<usize> {
        let mut rest = bytes;
        rmpv::decode::read_value_ref(&mut rest).ok()?;
        Some(bytes.len() - rest.len())
    }

    fn encoded(value: impl Into<rmpv::Value>) -> Vec<u8> {
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &value.into()).unwrap();
        bytes
    }

    #[test]
    fn each_marker_has_the_length_that_the_specification_requires() {
        for marker in 0..=u8::MAX {
            for length in 0..20 {
                let mut bytes = vec![0; length + 1];
                bytes[0] = marker;
                let expected = skipped_by_rmpv(&bytes).filter(|_| marker != 0xc1);
                assert_eq!(skipped(&bytes), expected, "{marker:#x} and {length} zeros");
            }
        }
    }

    #[test]
    fn a_value_of_another_type_is_an_error() {
        let text = encoded("text");
        assert_eq!(Reader::new(&text).text_or_nil(), Ok(Some("text")));
        assert_eq!(Reader::new(&text).u32_or_nil(), Err(Malformed));
        assert_eq!(Reader::new(&text).array_or_nil(), Err(Malformed));
        assert_eq!(
            Reader::new(&encoded(1_u64 << 32)).u32_or_nil(),
            Err(Malformed)
        );
        assert_eq!(Reader::new(&[0xa1, 0xff]).text_or_nil(), Err(Malformed));
        assert_eq!(Reader::new(&[0x92, 0x01]).array_or_nil(), Err(Malformed));
        assert_eq!(Reader::new(&[0x92, 1, 2]).array_or_nil(), Ok(Some(2)));
        assert_eq!(Reader::new(&[0xc0]).array_or_nil(), Ok(None));
    }

    proptest! {
        #[test]
        fn reading_an_encoded_number_returns_it(
            unsigned in any::<u64>(), shift in 0..64, signed in any::<i64>(), float in any::<f64>(),
        ) {
            let (unsigned, signed) = (unsigned >> shift, signed >> shift);
            for (bytes, value) in [
                (encoded(unsigned), Value::Unsigned(unsigned)),
                (encoded(signed), super::signed(signed)),
                (encoded(float), Value::Float(float)),
            ] {
                prop_assert_eq!(Reader::new(&bytes).next(), Ok(value));
            }
        }

        #[test]
        fn reading_an_encoded_header_returns_its_length(
            length in 0..70_000_usize, letters in 0..300_usize,
        ) {
            let pair = (rmpv::Value::Nil, rmpv::Value::Nil);
            let array = encoded(rmpv::Value::Array(vec![rmpv::Value::Nil; length]));
            let map = encoded(rmpv::Value::Map(vec![pair; length]));
            let text = "a".repeat(letters);
            let encoded_text = encoded(text.as_str());
            prop_assert_eq!(Reader::new(&array).next(), Ok(Value::Array(length as u32)));
            prop_assert_eq!(Reader::new(&map).next(), Ok(Value::Map(length as u32)));
            prop_assert_eq!(
                Reader::new(&encoded_text).next(),
                Ok(Value::Text(text.as_bytes()))
            );
        }

        #[test]
        fn a_run_ends_at_the_first_value_that_is_not_a_number(
            numbers in prop::collection::vec((any::<u32>(), 0..32), 0..40), max_count in 0_usize..40,
        ) {
            let numbers: Vec<u32> = numbers.iter().map(|(number, shift)| number >> shift).collect();
            let mut bytes: Vec<u8> = numbers.iter().flat_map(|&number| encoded(number)).collect();
            bytes.extend(encoded("end"));
            let mut reader = Reader::new(&bytes);
            let mut run = Vec::new();
            let count = reader.u32_run(max_count, &mut run);
            prop_assert_eq!(&run, &numbers[..max_count.min(numbers.len())]);
            prop_assert_eq!(count, run.len());
            reader.u32_run(usize::MAX, &mut run);
            prop_assert_eq!(run, numbers);
            prop_assert_eq!(reader.text_or_nil(), Ok(Some("end")));
        }

        #[test]
        fn any_bytes_are_skipped_like_in_rmpv(
            bytes in prop::collection::vec(
                // Small containers are more frequent than in random bytes, so that values nest.
                prop_oneof![any::<u8>(), 0x80..=0xa3_u8, 0xc4..=0xdf_u8],
                0..60,
            ),
        ) {
            // rmpv reads the one invalid marker as nil.
            if !bytes.contains(&0xc1) {
                prop_assert_eq!(skipped(&bytes), skipped_by_rmpv(&bytes));
            }
        }
    }
}
