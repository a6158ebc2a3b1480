//! `weir-agent verify`: whether the running kernel takes every program, and what each costs its
//! verifier, as a table or as JSON. Changes nothing on the node; the work is done by
//! [`crate::datapath::verify`].

use std::fmt::Write as _;

use serde_json::json;

use crate::datapath::{
    DatapathError,
    verify::{Switches, VerifiedProgram, verify},
};

/// How the result is shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// For people.
    Table,
    /// An array with an object for each program.
    Json,
}

/// Loads every program under every set of switches and describes them.
///
/// # Errors
///
/// The kernel refuses a program; the error ends with the end of the verifier's log.
pub fn run(format: Format) -> Result<String, DatapathError> {
    let mut programs = Vec::new();
    for switches in Switches::ALL {
        let verified = verify(switches)?;
        programs.extend(verified.into_iter().map(|program| (switches, program)));
    }
    Ok(match format {
        Format::Table => table(&programs),
        Format::Json => json(&programs),
    })
}

const HEADINGS: [&str; 7] = [
    "PROGRAM",
    "SWITCHES",
    "VERIFIED",
    "TRANSLATED",
    "JITED",
    "MEMORY",
    "TIME",
];

/// Instructions as a number, sizes in bytes, times in milliseconds; what the kernel does not tell
/// is a dash. Words stand left, numbers right.
fn table(programs: &[(Switches, VerifiedProgram)]) -> String {
    let number = |value: Option<u32>| value.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(programs.iter().map(|(switches, program)| {
        [
            program.name.to_owned(),
            switches.name().to_owned(),
            number(program.verified_instructions),
            number(program.translated),
            program.jited.to_string(),
            program.memory.to_string(),
            format!("{} ms", program.time.as_millis()),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; HEADINGS.len()] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            // Writing to a string does not fail.
            let _ = match column {
                0 => write!(text, "{cell:<width$}"),
                1 => write!(text, "  {cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text
}

fn json(programs: &[(Switches, VerifiedProgram)]) -> String {
    let rows: Vec<_> = programs
        .iter()
        .map(|(switches, program)| {
            json!({
                "program": program.name,
                "switches": switches.name(),
                "verified_instructions": program.verified_instructions,
                "translated_bytes": program.translated,
                "jited_bytes": program.jited,
                "memory_bytes": program.memory,
                "time_ms": u64::try_from(program.time.as_millis()).unwrap_or(u64::MAX),
            })
        })
        .collect();
    format!("{:#}\n", serde_json::Value::Array(rows))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn program() -> (Switches, VerifiedProgram) {
        let program = VerifiedProgram {
            name: "from_pod",
            verified_instructions: Some(12_345),
            translated: None,
            jited: 0,
            memory: 4096,
            time: Duration::from_millis(7),
        };
        (Switches::Default, program)
    }

    #[test]
    fn columns_are_aligned_and_unknown_values_are_dashes() {
        let expected = "\
PROGRAM   SWITCHES  VERIFIED  TRANSLATED  JITED  MEMORY  TIME
from_pod  default      12345           -      0    4096  7 ms
";
        assert_eq!(table(&[program()]), expected);
    }

    #[test]
    fn json_has_null_for_what_is_not_known() {
        let value: serde_json::Value = serde_json::from_str(&json(&[program()])).unwrap();
        assert_eq!(value[0]["verified_instructions"], 12_345);
        assert!(value[0]["translated_bytes"].is_null());
    }
}
