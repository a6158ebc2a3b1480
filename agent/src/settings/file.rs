//! The YAML file of settings: one mapping from names to values, each with the line on which it stands. It is read by
//! [`super::Values::gather`]; what the values mean is not known here.

use std::{collections::BTreeMap, fs, path::Path};

use super::{
    Given, Origin, SettingsError,
    definitions::{self, ALL},
};

pub(super) fn read_file(path: &Path) -> Result<BTreeMap<String, (String, Origin)>, SettingsError> {
    let text = fs::read_to_string(path).map_err(|cause| SettingsError::Unreadable {
        path: path.to_owned(),
        cause,
    })?;
    let not_a_mapping = |cause: String| SettingsError::NotAMapping {
        path: path.to_owned(),
        cause,
    };
    // A file with nothing but comments gives no settings.
    let mapping: Option<serde_norway::Mapping> =
        serde_norway::from_str(&text).map_err(|error| not_a_mapping(error.to_string()))?;
    let mut values = BTreeMap::new();
    for (key, value) in mapping.unwrap_or_default() {
        let Some(key) = key.as_str() else {
            return Err(not_a_mapping(format!("the key {key:?} is not text")));
        };
        let line = line_of(&text, key);
        let Some(definition) = definitions::find(key) else {
            return Err(SettingsError::UnknownKey {
                key: key.to_owned(),
                path: path.to_owned(),
                line,
                remedy: suggestion(key),
            });
        };
        let origin = Origin::File(path.to_owned(), line);
        match scalar_text(&value) {
            // `mtu:` without a value is as good as absent.
            Ok(None) => {}
            Ok(Some(value)) => {
                values.insert(key.to_owned(), (value, origin));
            }
            Err(problem) => {
                let given = Given {
                    value: serde_norway::to_string(&value)
                        .unwrap_or_default()
                        .trim()
                        .to_owned(),
                    origin,
                };
                return Err(SettingsError::Invalid {
                    name: definition.name,
                    place: given.place(definition),
                    value: given.value,
                    problem: problem.to_owned(),
                    remedy: format!(
                        "give one value: {}: {}",
                        definition.name, definition.value_name
                    ),
                });
            }
        }
    }
    Ok(values)
}

/// The value of a key as a flag would have it: a list becomes text with commas.
fn scalar_text(value: &serde_norway::Value) -> Result<Option<String>, &'static str> {
    use serde_norway::Value;
    Ok(Some(match value {
        Value::Null => return Ok(None),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => value.clone(),
        Value::Sequence(values) => {
            let mut texts = Vec::with_capacity(values.len());
            for value in values {
                match value {
                    Value::Sequence(_) | Value::Mapping(_) | Value::Tagged(_) => {
                        return Err("a list of lists or mappings");
                    }
                    _ => texts.extend(scalar_text(value)?),
                }
            }
            texts.join(",")
        }
        Value::Mapping(_) | Value::Tagged(_) => return Err("a mapping where a value belongs"),
    }))
}

/// The line on which a key of the top level stands, from 1.
fn line_of(text: &str, key: &str) -> usize {
    text.lines()
        .position(|line| {
            let line = line.trim_start_matches(['"', '\'', '{', ' ']);
            line.strip_prefix(key)
                .is_some_and(|rest| rest.trim_start_matches(['"', '\'', ' ']).starts_with(':'))
        })
        .map_or(1, |index| index + 1)
}

fn suggestion(key: &str) -> String {
    let normal = |name: &str| name.to_lowercase().replace(['-', '_'], "");
    let close = ALL.iter().map(|d| d.name).find(|name| {
        let (name, key) = (normal(name), normal(key));
        name == key || (key.len() > 2 && (name.starts_with(&key) || key.starts_with(&name)))
    });
    match close {
        Some(name) => format!("did you mean {name:?}?"),
        None => {
            let names: Vec<_> = ALL.iter().map(|d| d.name).collect();
            format!("known are {}", names.join(", "))
        }
    }
}
