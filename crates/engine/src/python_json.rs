//! The `tojson` filter of chat templates, which writes JSON like Python's `json.dumps`.

use std::io::{self, Write};

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

/// Returns a value as JSON: the filter
/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
/// `separators` that are not two strings are ignored.
///
/// # Errors
/// If an option is unknown or has another type, or the value cannot be written as JSON.
pub(crate) fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<(String, String)> = match options.get::<Option<Value>>("separators")? {
        None => None,
        Some(pair) => {
            let separator = |index| {
                let separator = pair.get_item_by_index(index).unwrap_or_default();
                separator.as_str().map(str::to_owned)
            };
            separator(0).zip(separator(1))
        }
    };
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;

    let between_items = if indent.is_some() { "," } else { ", " };
    let (between_items, after_key) =
        separators.unwrap_or_else(|| (between_items.to_owned(), ": ".to_owned()));
    let style = PythonStyle {
        indent,
        depth: 0,
        between_items,
        after_key,
        ensure_ascii: ensure_ascii.unwrap_or(false),
        is_empty: true,
    };
    let mut json = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut json, style);
    let written = if sort_keys.unwrap_or(false) {
        // A `serde_json::Value` sorts its keys.
        serde_json::to_value(value).and_then(|value| value.serialize(&mut serializer))
    } else {
        value.serialize(&mut serializer)
    };
    let failed = |error: String| Error::new(ErrorKind::BadSerialization, error);
    written.map_err(|error| failed(error.to_string()))?;
    let json = String::from_utf8(json).map_err(|error| failed(error.to_string()))?;
    Ok(Value::from(json))
}

/// A `serde_json` formatter that writes JSON like Python.
struct PythonStyle {
    /// Spaces per level; `None` writes everything on one line.
    indent: Option<usize>,
    /// Nesting level of the current list or object.
    depth: usize,
    /// Separator between two elements or entries.
    between_items: String,
    /// Separator between a key and its value.
    after_key: String,
    /// Whether characters outside ASCII are escaped.
    ensure_ascii: bool,
    /// Whether the innermost list or object has no element yet.
    is_empty: bool,
}

impl PythonStyle {
    /// Opens a list or an object.
    fn open<W: Write + ?Sized>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(bracket)
    }

    /// Closes a list or an object.
    fn close<W: Write + ?Sized>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth = self.depth.saturating_sub(1);
        if !std::mem::take(&mut self.is_empty) {
            self.new_line(writer)?;
        }
        writer.write_all(bracket)
    }

    /// Writes the text before the next element or entry.
    fn next<W: Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.is_empty = false;
        if !first {
            writer.write_all(self.between_items.as_bytes())?;
        }
        self.new_line(writer)
    }

    /// Starts an indented line, if the output is indented.
    fn new_line<W: Write + ?Sized>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            None => Ok(()),
            Some(indent) => write!(writer, "\n{:1$}", "", indent * self.depth),
        }
    }
}

impl Formatter for PythonStyle {
    fn begin_array<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(writer, first)
    }

    fn end_array_value<W: Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }

    fn begin_object<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.after_key.as_bytes())
    }

    fn end_object_value<W: Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }

    fn write_f64<W: Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        // Rust and Python both write the shortest digits that parse to the same number. They differ
        // in when they use an exponent and in how they write it.
        let magnitude = value.abs();
        if magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
            return write!(writer, "{value:?}");
        }
        let scientific = format!("{value:e}");
        let Some((digits, exponent)) = scientific.split_once('e') else {
            return writer.write_all(scientific.as_bytes());
        };
        match exponent.strip_prefix('-') {
            Some(exponent) => write!(writer, "{digits}e-{exponent:0>2}"),
            None => write!(writer, "{digits}e+{exponent:0>2}"),
        }
    }

    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ensure_ascii || fragment.is_ascii() {
            return writer.write_all(fragment.as_bytes());
        }
        for character in fragment.chars() {
            if character.is_ascii() {
                write!(writer, "{character}")?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::Quote => writer.write_all(b"\\\""),
            CharEscape::ReverseSolidus => writer.write_all(b"\\\\"),
            CharEscape::Solidus => writer.write_all(b"/"),
            CharEscape::Backspace => writer.write_all(b"\\b"),
            CharEscape::FormFeed => writer.write_all(b"\\f"),
            CharEscape::LineFeed => writer.write_all(b"\\n"),
            CharEscape::CarriageReturn => writer.write_all(b"\\r"),
            CharEscape::Tab => writer.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(writer, "\\u{byte:04x}"),
        }
    }
}
