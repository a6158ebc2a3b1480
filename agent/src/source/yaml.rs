//! Kubernetes manifests as text: YAML or JSON, several documents in one file, lists as
//! `kubectl get -o yaml` prints them. Turns text into objects and errors with their lines; reads
//! no files. Called by the directory source, and by tests.

mod depth;
mod document;
mod head;

use crate::objects::{Object, ObjectKey};

/// How the text is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// YAML; documents are separated by lines that start with `---`.
    Yaml,
    /// JSON; values follow each other.
    Json,
}

/// What a text holds.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Manifest {
    /// The objects, in the order of the text.
    pub objects: Vec<Located>,
    /// Documents and items of lists that could not be read.
    pub errors: Vec<ManifestError>,
    /// `apiVersion` and `kind` of objects that Weir has no use for, in the order of the text.
    pub ignored: Vec<String>,
}

/// An object and where it stands.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Located {
    /// First line of the document, counted from one.
    pub line: usize,
    /// The object.
    pub object: Object,
}

/// A document, or an item of a list, that could not be read.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("line {line}: {cause}")]
pub struct ManifestError {
    /// Line of the mistake, or first line of the document; counted from one.
    pub line: usize,
    /// What is wrong.
    pub cause: String,
    /// The object that stands there, when that much could be understood.
    pub object: Option<ObjectKey>,
}

/// Reads a text. A mistake costs its own document, or its own item of a list, and no other; only
/// in JSON does a syntax error hide what follows it.
pub fn parse(text: &str, format: Format) -> Manifest {
    let mut manifest = Manifest::default();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match format {
        Format::Yaml => {
            for chunk in yaml_chunks(text) {
                document::read(chunk, format, &mut manifest);
            }
        }
        Format::Json => json_chunks(text, &mut manifest),
    }
    manifest
}

/// The text of one document.
#[derive(Clone, Copy, Debug)]
struct Chunk<'a> {
    text: &'a str,
    /// Lines of the file before it.
    lines_before: usize,
}

/// Cuts at document markers, which cannot be anything else at the start of a line (YAML 1.2,
/// section 9.1.2). So a syntax error does not reach beyond its document.
fn yaml_chunks(text: &str) -> Vec<Chunk<'_>> {
    fn is_marker(line: &str, marker: &str) -> bool {
        line.strip_prefix(marker)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    }
    let mut chunks = Vec::new();
    let (mut start, mut start_line, mut end) = (0, 0, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line, "---") {
            chunks.push((start..end, start_line));
            (start, start_line) = (end, index);
        }
        end += line.len();
        if is_marker(line, "...") {
            chunks.push((start..end, start_line));
            (start, start_line) = (end, index + 1);
        }
    }
    chunks.push((start..end, start_line));
    chunks
        .into_iter()
        .map(|(range, lines_before)| Chunk {
            text: &text[range],
            lines_before,
        })
        .filter(|chunk| chunk.first_line().is_some())
        .collect()
}

impl Chunk<'_> {
    /// The first line, counted from one, that is more than a marker, comment or directive.
    fn first_line(&self) -> Option<usize> {
        let is_content = |line: &str| {
            let line = line.strip_prefix("---").unwrap_or(line).trim();
            !(line.is_empty() || line.starts_with(['#', '%']) || line == "...")
        };
        let offset = self.text.lines().position(is_content)?;
        Some(self.lines_before + offset + 1)
    }
}

/// Cuts into JSON values.
fn json_chunks(text: &str, manifest: &mut Manifest) {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
    let mut start = 0;
    while let Some(value) = values.next() {
        let lines_before = text[..start].matches('\n').count();
        if let Err(error) = value {
            let chunk = Chunk {
                text: &text[start..],
                lines_before,
            };
            let error = document::Failure::from_json(&error, 0);
            manifest.errors.push(error.at(chunk, None));
            return;
        }
        let end = values.byte_offset();
        let chunk = Chunk {
            text: &text[start..end],
            lines_before,
        };
        document::read(chunk, Format::Json, manifest);
        start = end;
    }
}
