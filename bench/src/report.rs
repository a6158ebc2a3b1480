//! What was measured, as tables: printed while it is measured and written to the page of figures.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::machine;

/// A table with a heading.
#[derive(Debug)]
pub struct Table {
    title: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With the names of its columns.
    pub fn new(title: &str, header: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            header: header.iter().map(|&name| name.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells stay empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// As Markdown, with the columns aligned for those who read the source.
    fn markdown(&self) -> String {
        let width = |column: usize| {
            self.rows
                .iter()
                .chain([&self.header])
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or_default()
        };
        let line = |cells: &[String]| {
            let mut line = String::from("|");
            for column in 0..self.header.len() {
                let cell = cells.get(column).map_or("", String::as_str);
                let padding = width(column) - cell.chars().count();
                line.push_str(&format!(" {cell}{} |", " ".repeat(padding)));
            }
            line
        };
        let rule: Vec<String> = (0..self.header.len())
            .map(|column| "-".repeat(width(column)))
            .collect();
        let mut text = format!(
            "### {}\n\n{}\n{}\n",
            self.title,
            line(&self.header),
            line(&rule)
        );
        for row in &self.rows {
            text.push_str(&line(row));
            text.push('\n');
        }
        text
    }
}

/// One part of the page.
#[derive(Debug)]
pub struct Section {
    name: &'static str,
    text: String,
}

impl Section {
    /// One that says when and where it was measured; `name` is that of the command's argument.
    ///
    /// # Errors
    ///
    /// As [`machine::sentence`].
    pub fn new(name: &'static str, title: &str) -> Result<Self> {
        let mut section = Self {
            name,
            text: format!("## {title}\n"),
        };
        section.paragraph(&machine::sentence()?);
        Ok(section)
    }

    /// Adds and prints a paragraph.
    pub fn paragraph(&mut self, text: &str) {
        println!("\n{text}");
        // Writing to a String cannot fail.
        let _ = write!(self.text, "\n{text}\n");
    }

    /// Adds and prints a table.
    pub fn table(&mut self, table: &Table) {
        let markdown = table.markdown();
        println!("\n{markdown}");
        // As above.
        let _ = write!(self.text, "\n{markdown}");
    }
}

/// Replaces the sections that were measured and leaves the others of the page as they are.
///
/// # Errors
///
/// The page cannot be read or written, or has lost the marks of a section.
pub fn write(page: &Path, sections: &[Section]) -> Result<()> {
    let mut text = fs::read_to_string(page).with_context(|| format!("read {}", page.display()))?;
    for section in sections {
        text = replace(&text, section.name, &section.text).with_context(|| {
            format!(
                "{} has no lines {} and {}",
                page.display(),
                begin(section.name),
                end(section.name)
            )
        })?;
    }
    fs::write(page, text).with_context(|| format!("write {}", page.display()))
}

fn begin(name: &str) -> String {
    format!("<!-- {name}: written by `cargo xtask bench` -->")
}

fn end(name: &str) -> String {
    format!("<!-- end of {name} -->")
}

fn replace(page: &str, name: &str, text: &str) -> Option<String> {
    let (before, rest) = page.split_once(&begin(name))?;
    let (_, after) = rest.split_once(&end(name))?;
    Some(format!(
        "{before}{}\n{text}{}{after}",
        begin(name),
        end(name)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_between_its_marks() {
        let page = format!("a\n{}\nold\n{}\nz\n", begin("x"), end("x"));
        let new = replace(&page, "x", "new\n").unwrap();
        assert_eq!(new, format!("a\n{}\nnew\n{}\nz\n", begin("x"), end("x")));
        assert_eq!(replace(&page, "y", ""), None);
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new("T", &["a", "long"]);
        table.row(["1–2".into(), "3".into()]);
        assert_eq!(
            table.markdown(),
            "### T\n\n| a   | long |\n| --- | ---- |\n| 1–2 | 3    |\n"
        );
    }
}
