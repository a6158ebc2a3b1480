//! Aligned columns with headings in upper case.

/// Colour of a cell, where colours are shown.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Colour {
    /// None.
    #[default]
    Plain,
    /// All is well.
    Green,
    /// Worth a look.
    Yellow,
    /// Wrong.
    Red,
}

impl Colour {
    const fn code(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Green => Some("32"),
            Self::Yellow => Some("33"),
            Self::Red => Some("31"),
        }
    }

    /// The text in this colour, if colours are on.
    pub fn paint(self, text: &str, colours: bool) -> String {
        match self.code().filter(|_| colours && !text.is_empty()) {
            Some(code) => format!("\x1b[{code}m{text}\x1b[0m"),
            None => text.to_owned(),
        }
    }
}

/// Text of one cell. It may have several lines, which stand below each other.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    text: String,
    colour: Colour,
    right: bool,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }
}

impl Cell {
    /// In a colour.
    pub fn coloured(text: impl Into<String>, colour: Colour) -> Self {
        Self {
            colour,
            ..text.into().into()
        }
    }

    /// A number, aligned at the right.
    pub fn number(number: impl ToString) -> Self {
        Self {
            right: true,
            ..number.to_string().into()
        }
    }

    /// Several lines.
    pub fn lines(lines: impl IntoIterator<Item = String>) -> Self {
        let lines: Vec<_> = lines.into_iter().collect();
        if lines.is_empty() {
            "-".into()
        } else {
            lines.join("\n").into()
        }
    }
}

/// A table under construction.
#[derive(Clone, Debug)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// With these headings.
    pub fn new<const N: usize>(headings: [&'static str; N]) -> Self {
        Self {
            headings: headings.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, with a cell for each heading.
    pub fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        debug_assert_eq!(N, self.headings.len());
        self.rows.push(cells.into());
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The finished text, with a line end after every line and no trailing blanks.
    pub fn render(&self, colours: bool) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            let lines = cells.flat_map(|cell| cell.text.lines().map(|line| line.chars().count()));
            lines
                .chain([self.headings[column].len()])
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.headings.len()).map(width).collect();
        let right: Vec<bool> = (0..self.headings.len())
            .map(|column| self.rows.first().is_some_and(|row| row[column].right))
            .collect();
        let mut text = String::new();
        let headings: Vec<(&str, Colour)> =
            self.headings.iter().map(|h| (*h, Colour::Plain)).collect();
        push_line(&mut text, &headings, &widths, &right, colours);
        for row in &self.rows {
            let height = row
                .iter()
                .map(|c| c.text.lines().count())
                .max()
                .unwrap_or(1);
            for line in 0..height.max(1) {
                let cells: Vec<(&str, Colour)> = row
                    .iter()
                    .map(|cell| (cell.text.lines().nth(line).unwrap_or(""), cell.colour))
                    .collect();
                push_line(&mut text, &cells, &widths, &right, colours);
            }
        }
        text
    }
}

fn push_line(
    text: &mut String,
    cells: &[(&str, Colour)],
    widths: &[usize],
    right: &[bool],
    colours: bool,
) {
    let mut line = String::new();
    for (column, (cell, colour)) in cells.iter().enumerate() {
        if column > 0 {
            line.push_str("  ");
        }
        let padding = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
        let cell = colour.paint(cell, colours);
        if right[column] {
            line.push_str(&padding);
            line.push_str(&cell);
        } else {
            line.push_str(&cell);
            line.push_str(&padding);
        }
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["NAME", "COUNT", "STATE"]);
        table.row([
            "a".into(),
            Cell::number(5),
            Cell::coloured("ok", Colour::Green),
        ]);
        table.row([
            Cell::lines(["Zürich".to_owned(), "b".to_owned()]),
            Cell::number(123_456),
            "bad".into(),
        ]);
        table
    }

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_blanks() {
        assert_eq!(
            table().render(false),
            "NAME     COUNT  STATE\n\
             a            5  ok\n\
             Zürich  123456  bad\n\
             b\n"
        );
    }

    #[test]
    fn colours_do_not_move_columns() {
        let text = table().render(true);
        assert!(
            text.contains("a            5  \x1b[32mok\x1b[0m\n"),
            "{text:?}"
        );
    }

    #[test]
    fn a_table_without_rows_is_its_headings() {
        assert_eq!(Table::new(["A", "B"]).render(false), "A  B\n");
    }
}
