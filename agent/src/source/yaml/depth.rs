//! How deep a YAML document is nested, before it is parsed: the parser's work grows with the
//! square of the depth. Follows the parser's scanner only as far as needed to tell brackets that
//! nest from those in text, and counts too many rather than too few.

/// Levels that a document may have. The decoder goes no deeper either.
pub(super) const DEPTH_MAX: usize = 128;

/// The line, counted from zero, at which the document is nested deeper than [`DEPTH_MAX`].
pub(super) fn line_too_deep(text: &str) -> Option<usize> {
    let mut scan = Scan::new(text);
    while scan.token() {
        if scan.depth() > DEPTH_MAX {
            return Some(scan.line);
        }
    }
    None
}

struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
    line: usize,
    line_start: usize,
    /// Open brackets and braces.
    flow: usize,
    /// Columns of the open block sequences and mappings.
    indents: Vec<usize>,
    /// Column of what is a key if a colon follows.
    key: Option<usize>,
}

impl<'a> Scan<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            bytes: text.as_bytes(),
            at: 0,
            line: 0,
            line_start: 0,
            flow: 0,
            indents: Vec::new(),
            key: None,
        }
    }

    /// Whether a document begins or ends here. The text was cut at such marks, but not at those
    /// before one of the rarer line breaks.
    fn is_marker(&self) -> bool {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        self.column() == 0
            && (rest.starts_with(b"---") || rest.starts_with(b"..."))
            && self.is_blank(3)
    }

    fn depth(&self) -> usize {
        self.indents.len() + self.flow
    }

    fn column(&self) -> usize {
        self.at - self.line_start
    }

    fn peek(&self, ahead: usize) -> Option<u8> {
        self.bytes.get(self.at + ahead).copied()
    }

    /// Length of the line break here, or 0. YAML 1.1 has five of them.
    fn break_length(&self, ahead: usize) -> usize {
        match self.bytes.get(self.at + ahead..).unwrap_or_default() {
            [b'\n' | b'\r', ..] => 1,
            [0xc2, 0x85, ..] => 2,
            [0xe2, 0x80, 0xa8 | 0xa9, ..] => 3,
            _ => 0,
        }
    }

    /// Whether a blank, a line break or the end stands there.
    fn is_blank(&self, ahead: usize) -> bool {
        matches!(self.peek(ahead), None | Some(b' ' | b'\t')) || self.break_length(ahead) > 0
    }

    /// Goes on by a byte or a line break.
    fn advance(&mut self) {
        match self.break_length(0) {
            0 => self.at += 1,
            length => {
                self.line +=
                    usize::from(self.peek(0) != Some(b'\r') || self.peek(1) != Some(b'\n'));
                self.at += length;
                self.line_start = self.at;
                if self.flow == 0 {
                    self.key = None;
                }
            }
        }
    }

    fn skip_line(&mut self) {
        while self.peek(0).is_some() && self.break_length(0) == 0 {
            self.at += 1;
        }
    }

    /// Passes over one token, or a blank. False at the end.
    fn token(&mut self) -> bool {
        let Some(byte) = self.peek(0) else {
            return false;
        };
        let in_flow = self.flow > 0;
        match byte {
            _ if self.break_length(0) > 0 => self.advance(),
            b' ' | b'\t' => self.at += 1,
            b'#' => self.skip_line(),
            _ if !in_flow && self.is_marker() => {
                self.indents.clear();
                self.at += 3;
            }
            b'%' if self.column() == 0 && !in_flow => self.skip_line(),
            b'[' | b'{' => {
                self.begin_node();
                self.flow += 1;
                self.at += 1;
            }
            b']' | b'}' if in_flow => {
                self.flow -= 1;
                self.at += 1;
            }
            b',' | b'?' | b':' if in_flow => self.at += 1,
            b'-' | b'?' if self.is_blank(1) => {
                self.open_block(self.column());
                self.key = None;
                self.at += 1;
            }
            b':' if self.is_blank(1) => {
                let column = self.key.take().unwrap_or_else(|| self.column());
                self.open_block(column);
                self.at += 1;
            }
            b'|' | b'>' if !in_flow => self.block_scalar(),
            b'"' | b'\'' => self.quoted(byte),
            b'&' | b'*' | b'!' => self.property(),
            _ => self.plain(),
        }
        true
    }

    /// A node begins here; collections that stand further to the right have ended.
    fn begin_node(&mut self) {
        if self.flow > 0 {
            return;
        }
        let column = self.column();
        self.close_blocks(column);
        self.key.get_or_insert(column);
    }

    fn close_blocks(&mut self, column: usize) {
        while self.indents.last().is_some_and(|indent| *indent > column) {
            self.indents.pop();
        }
    }

    fn open_block(&mut self, column: usize) {
        self.close_blocks(column);
        if self.indents.last().is_none_or(|indent| *indent < column) {
            self.indents.push(column);
        }
    }

    /// A tag, anchor or alias.
    fn property(&mut self) {
        self.begin_node();
        self.at += 1;
        while !self.is_blank(0) && !self.is_flow_indicator() {
            self.at += 1;
        }
    }

    fn is_flow_indicator(&self) -> bool {
        self.flow > 0 && matches!(self.peek(0), Some(b',' | b'[' | b']' | b'{' | b'}'))
    }

    fn quoted(&mut self, quote: u8) {
        self.begin_node();
        let key = self.key;
        self.at += 1;
        while let Some(byte) = self.peek(0) {
            let escapes = match quote {
                b'"' => byte == b'\\',
                _ => byte == quote && self.peek(1) == Some(quote),
            };
            self.advance();
            if escapes {
                self.advance();
            } else if byte == quote {
                break;
            }
        }
        self.key = key;
    }

    /// A scalar without quotes. It may go on in the next lines, where it swallows any bracket.
    fn plain(&mut self) {
        self.begin_node();
        self.advance();
        while self.peek(0).is_some() && !self.is_flow_indicator() {
            if self.peek(0) == Some(b':') && self.is_blank(1) {
                return;
            }
            if !self.is_blank(0) {
                self.advance();
                continue;
            }
            let line_start = self.line_start;
            while self.peek(0).is_some() && self.is_blank(0) {
                self.advance();
            }
            let indent = self.indents.last().copied();
            let dedented = self.flow == 0
                && self.line_start != line_start
                && indent.is_some_and(|indent| self.column() <= indent);
            if dedented || self.is_marker() || self.peek(0) == Some(b'#') {
                return;
            }
        }
    }

    /// The text after `|` or `>`: all lines that are indented deep enough.
    fn block_scalar(&mut self) {
        let header = self.at;
        self.skip_line();
        let digit = self.bytes[header..self.at]
            .iter()
            .take_while(|byte| **byte != b'#')
            .find(|byte| byte.is_ascii_digit());
        let parent = self.indents.last().copied();
        self.advance();
        let indent = match digit {
            Some(digit) => parent.unwrap_or(0) + usize::from(digit - b'0'),
            None => self.first_indent().max(parent.map_or(1, |p| p + 1)),
        };
        while self.peek(0).is_some() {
            let spaces = self.spaces(self.at);
            let is_empty = spaces < indent && self.break_length(spaces) > 0;
            if spaces < indent && !is_empty {
                return;
            }
            self.skip_line();
            self.advance();
        }
    }

    fn spaces(&self, from: usize) -> usize {
        let rest = self.bytes.get(from..).unwrap_or_default();
        rest.iter().take_while(|byte| **byte == b' ').count()
    }

    /// The deepest indentation up to the first line that is not empty.
    fn first_indent(&self) -> usize {
        let (mut deepest, mut ahead) = (0, 0);
        loop {
            let spaces = self.spaces(self.at + ahead);
            deepest = deepest.max(spaces);
            match self.break_length(ahead + spaces) {
                0 => return deepest,
                length => ahead += spaces + length,
            }
        }
    }
}
