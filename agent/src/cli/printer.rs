//! The only way to standard output: tables for people, JSON for programs.
//!
//! Standard output carries data, standard error everything else. A reader that goes away ends the
//! command quietly: the error of the write becomes [`super::error::Exit::ReaderGone`].

use std::io::{self, IsTerminal as _, Write};

use clap::ValueEnum;
use cortex_shared::text::is_printable;
use serde::Serialize;

use super::error::{CliError, printable};

/// Shape of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// One JSON document.
    Json,
    /// One JSON object a line.
    Jsonl,
}

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorWhen {
    /// On a terminal, unless `NO_COLOR` is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl ColorWhen {
    fn choice(self) -> anstream::ColorChoice {
        match self {
            Self::Auto => anstream::ColorChoice::Auto,
            Self::Always => anstream::ColorChoice::Always,
            Self::Never => anstream::ColorChoice::Never,
        }
    }
}

/// Something that is listed: a row of a table, and an object with stable field names.
pub trait Row: Serialize {
    /// Headings, in the order of the cells.
    const COLUMNS: &'static [&'static str];

    /// The cells.
    fn cells(&self) -> Vec<String>;
}

/// Writes results in the wanted shape.
pub struct Printer {
    format: Format,
    out: Box<dyn Write + Send>,
}

impl Printer {
    /// To standard output.
    #[must_use]
    pub fn stdout(format: Format, color: ColorWhen) -> Self {
        let out = anstream::AutoStream::new(io::stdout(), color.choice());
        Self { format, out: Box::new(io::BufWriter::new(out)) }
    }

    /// Writes a list: a table, an array, or a line each.
    ///
    /// # Errors
    /// If writing fails.
    pub fn list<R: Row>(&mut self, rows: &[R]) -> Result<(), CliError> {
        match self.format {
            Format::Table => {
                let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
                write_table(&mut self.out, R::COLUMNS, &cells)?;
            }
            Format::Json => write_document(&mut self.out, &rows)?,
            Format::Jsonl => {
                for row in rows {
                    write_line(&mut self.out, row)?;
                }
            }
        }
        Ok(self.out.flush()?)
    }

    /// Writes one thing: lines of `label  value`, or a document.
    ///
    /// # Errors
    /// If writing fails.
    pub fn show<T: Serialize>(
        &mut self,
        value: &T,
        lines: &[(&str, String)],
    ) -> Result<(), CliError> {
        match self.format {
            Format::Table => {
                let width = lines.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
                for (label, value) in lines {
                    writeln!(self.out, "{label:<width$}  {}", printable(value))?;
                }
            }
            Format::Json => write_document(&mut self.out, value)?,
            Format::Jsonl => write_line(&mut self.out, value)?,
        }
        Ok(self.out.flush()?)
    }

    /// Writes one of a list that is not complete yet, of which so many came before. To be closed by
    /// [`Printer::end_items`]; tables have no such lists.
    ///
    /// # Errors
    /// If writing fails.
    pub fn item<T: Serialize>(&mut self, before: usize, value: &T) -> Result<(), CliError> {
        match self.format {
            Format::Table => {}
            Format::Json => {
                self.out.write_all(if before == 0 { b"[\n" } else { b",\n" })?;
                let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
                self.out.write_all(escaped(text).as_bytes())?;
            }
            Format::Jsonl => write_line(&mut self.out, value)?,
        }
        Ok(self.out.flush()?)
    }

    /// Ends a list of so many [`Printer::item`]s.
    ///
    /// # Errors
    /// If writing fails.
    pub fn end_items(&mut self, count: usize) -> Result<(), CliError> {
        if self.format == Format::Json {
            self.out.write_all(if count == 0 { b"[]\n" } else { b"\n]\n" })?;
        }
        Ok(self.out.flush()?)
    }

    /// Writes a sentence for people, or a document for programs.
    ///
    /// # Errors
    /// If writing fails.
    pub fn say<T: Serialize>(&mut self, sentence: &str, value: &T) -> Result<(), CliError> {
        match self.format {
            Format::Table => {
                for line in sentence.lines() {
                    writeln!(self.out, "{}", printable(line))?;
                }
            }
            Format::Json => write_document(&mut self.out, value)?,
            Format::Jsonl => write_line(&mut self.out, value)?,
        }
        Ok(self.out.flush()?)
    }

    /// Writes text as it is, whatever the format.
    ///
    /// # Errors
    /// If writing fails.
    pub fn raw(&mut self, text: &[u8]) -> Result<(), CliError> {
        self.out.write_all(text)?;
        Ok(self.out.flush()?)
    }
}

fn write_document<T: Serialize>(out: &mut dyn Write, value: &T) -> io::Result<()> {
    writeln!(out, "{}", escaped(serde_json::to_string_pretty(value)?))
}

fn write_line<T: Serialize>(out: &mut dyn Write, value: &T) -> io::Result<()> {
    writeln!(out, "{}", escaped(serde_json::to_string(value)?))
}

/// JSON that can be shown on a terminal and means the same. What is not printable stands in
/// strings only, but for the line feeds between values.
fn escaped(json: String) -> String {
    if json.chars().all(|c| c == '\n' || is_printable(c)) {
        return json;
    }
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '\n' || is_printable(c) {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

fn write_table(out: &mut dyn Write, columns: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([columns[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| -> io::Result<()> {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            if !text.is_empty() {
                text.push_str("  ");
            }
            text.push_str(&format!("{cell:<width$}"));
        }
        writeln!(out, "{}", text.trim_end())
    };
    line(&mut columns.iter().copied())?;
    for row in &rows {
        line(&mut row.iter().map(String::as_str))?;
    }
    Ok(())
}

/// Writes an error or a notice to standard error. That it cannot be written helps nobody to know.
pub fn complain(text: &str, color: ColorWhen) {
    let mut err = anstream::AutoStream::new(io::stderr(), color.choice());
    for line in text.lines().map(printable) {
        let painted = match line.split_once(": ") {
            Some(("error", rest)) => format!("\u{1b}[1;31merror:\u{1b}[0m {rest}"),
            Some(("warning", rest)) => format!("\u{1b}[1;33mwarning:\u{1b}[0m {rest}"),
            Some(("hint", rest)) => format!("\u{1b}[1;36mhint:\u{1b}[0m {rest}"),
            _ => line.clone(),
        };
        writeln!(err, "{painted}").ok();
    }
}

/// Whether progress may be drawn.
#[must_use]
pub fn progress_is_visible() -> bool {
    io::stderr().is_terminal()
}

/// A time for people, in UTC; `-` for "never".
#[must_use]
pub fn time(ms: i64) -> String {
    if ms == 0 {
        return "-".to_owned();
    }
    jiff::Timestamp::from_millisecond(ms)
        .map_or_else(|_| "?".to_owned(), |time| format!("{time:.0}"))
}

/// A size for people.
#[must_use]
pub fn size(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[derive(Serialize)]
    struct Fruit {
        name: &'static str,
        count: u32,
    }

    impl Row for Fruit {
        const COLUMNS: &'static [&'static str] = &["NAME", "COUNT"];
        fn cells(&self) -> Vec<String> {
            vec![self.name.to_owned(), self.count.to_string()]
        }
    }

    fn printed(format: Format, rows: &[Fruit]) -> String {
        let buffer = Buffer::default();
        let mut printer = Printer { format, out: Box::new(buffer.clone()) };
        printer.list(rows).unwrap();
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lists_have_three_shapes() {
        let rows = [Fruit { name: "pear", count: 2 }, Fruit { name: "ap\u{1b}ple", count: 10 }];
        assert_eq!(printed(Format::Table, &rows), "NAME    COUNT\npear    2\nap ple  10\n");
        assert_eq!(
            printed(Format::Jsonl, &rows),
            "{\"name\":\"pear\",\"count\":2}\n{\"name\":\"ap\\u001bple\",\"count\":10}\n"
        );
        let document: serde_json::Value =
            serde_json::from_str(&printed(Format::Json, &rows)).unwrap();
        assert_eq!(document[1]["count"], 10);
        assert_eq!(printed(Format::Json, &[]), "[]\n");
        assert_eq!(printed(Format::Table, &[]), "NAME  COUNT\n");
    }

    #[test]
    fn characters_that_change_how_others_look_are_written_out_in_every_shape() {
        let rows = [Fruit { name: "a\u{202e}b\u{9b}\u{e0041}\u{7f}", count: 1 }];
        assert!(printed(Format::Table, &rows).contains("\na\\u{202e}b \\u{e0041}   1\n"));
        for format in [Format::Json, Format::Jsonl] {
            let text = printed(format, &rows);
            assert!(text.contains(r"a\u202eb\u009b\udb40\udc41"), "{text}");
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            let fruit = if format == Format::Json { &value[0] } else { &value };
            assert_eq!(fruit["name"], rows[0].name);
            // Those of a list that is not complete yet, too.
            let buffer = Buffer::default();
            let mut printer = Printer { format, out: Box::new(buffer.clone()) };
            printer.item(0, &rows[0]).unwrap();
            printer.end_items(1).unwrap();
            let item = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
            assert_eq!(serde_json::from_str::<serde_json::Value>(&item).unwrap(), value);
            assert!(item.contains(r"a\u202eb\u009b\udb40\udc41\u007f"), "{item}");
        }
    }

    #[test]
    fn reader_that_went_away_is_no_failure() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for format in [Format::Table, Format::Json, Format::Jsonl] {
            let mut printer = Printer { format, out: Box::new(Gone) };
            let error = printer.list(&[Fruit { name: "pear", count: 2 }]).unwrap_err();
            assert_eq!(error.exit().code(), 0, "{format:?}");
        }
    }

    #[test]
    fn times_are_readable() {
        assert_eq!(time(0), "-");
        assert_eq!(time(1_700_000_000_123), "2023-11-14T22:13:20Z");
    }
}
