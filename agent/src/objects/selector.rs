//! Label selectors as text, `app=legacy,!weir`, with the meaning that `kubectl --selector` gives
//! them (concepts: "Labels and Selectors"). Read by the settings, used by the model.

use std::collections::{BTreeMap, BTreeSet};

/// Conditions on labels, all of which must hold. There is at least one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LabelSelector(Vec<Requirement>);

/// One condition.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Requirement {
    Exists(String),
    Absent(String),
    In(String, BTreeSet<String>),
    /// Holds too where the label is absent.
    NotIn(String, BTreeSet<String>),
}

/// Why a text is no selector.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(String);

impl SelectorError {
    /// What can be written, for people.
    pub const REMEDY: &str = "give conditions separated by commas: key, !key, key=value, \
                              key!=value, key in (a,b), key notin (a,b)";
}

type Result<T> = std::result::Result<T, SelectorError>;

fn wrong<T>(text: impl Into<String>) -> Result<T> {
    Err(SelectorError(text.into()))
}

impl LabelSelector {
    /// Reads a selector.
    ///
    /// # Errors
    ///
    /// The text names no condition, or what is wrong with one.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rest = text.trim_start();
        let mut requirements = Vec::new();
        loop {
            let (requirement, after) = requirement(rest)?;
            requirements.push(requirement);
            rest = after.trim_start();
            match rest.strip_prefix(',') {
                Some(after) => rest = after.trim_start(),
                None if rest.is_empty() => return Ok(Self(requirements)),
                None => return wrong(format!("a comma or the end is missing before {rest:?}")),
            }
        }
    }

    /// Whether it selects an object with these labels.
    #[must_use]
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Absent(key) => !labels.contains_key(key),
            Requirement::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
        })
    }
}

/// The first condition of the text, and what follows it.
fn requirement(text: &str) -> Result<(Requirement, &str)> {
    if let Some(text) = text.strip_prefix('!') {
        let (key, rest) = key(text.trim_start())?;
        return Ok((Requirement::Absent(key), rest));
    }
    let (key, rest) = key(text)?;
    let after = rest.trim_start();
    for (operator, equal) in [("==", true), ("!=", false), ("=", true)] {
        if let Some(after) = after.strip_prefix(operator) {
            let (value, rest) = value(after.trim_start())?;
            let values = BTreeSet::from([value]);
            return Ok(match equal {
                true => (Requirement::In(key, values), rest),
                false => (Requirement::NotIn(key, values), rest),
            });
        }
    }
    let (word, list) = word(after);
    Ok(match word {
        "in" => {
            let (values, rest) = values(list)?;
            (Requirement::In(key, values), rest)
        }
        "notin" => {
            let (values, rest) = values(list)?;
            (Requirement::NotIn(key, values), rest)
        }
        _ => (Requirement::Exists(key), rest),
    })
}

/// The letters that keys and values are made of, as far as they go.
fn word(text: &str) -> (&str, &str) {
    let part_of_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    text.split_at(text.find(|c: char| !part_of_word(c)).unwrap_or(text.len()))
}

fn key(text: &str) -> Result<(String, &str)> {
    let (key, rest) = word(text);
    if key.is_empty() {
        return match text.chars().next() {
            None => wrong("the key of a label is missing at the end"),
            Some(_) => wrong(format!("the key of a label is missing before {text:?}")),
        };
    }
    let (prefix, name) = key.split_once('/').unwrap_or(("dns.example", key));
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    if !is_name(name) || !is_name_of(prefix, 253) || !prefix.chars().all(lower) {
        return wrong(format!("{key:?} cannot be the key of a label"));
    }
    Ok((key.to_owned(), rest))
}

/// May be empty.
fn value(text: &str) -> Result<(String, &str)> {
    let (value, rest) = word(text);
    if !value.is_empty() && !is_name(value) {
        return wrong(format!("{value:?} cannot be the value of a label"));
    }
    Ok((value.to_owned(), rest))
}

/// Values in parentheses.
fn values(text: &str) -> Result<(BTreeSet<String>, &str)> {
    let Some(mut rest) = text.trim_start().strip_prefix('(') else {
        return wrong(format!("a list in parentheses is missing before {text:?}"));
    };
    let mut values = BTreeSet::new();
    loop {
        let (value, after) = value(rest.trim_start())?;
        values.insert(value);
        let after = after.trim_start();
        if let Some(after) = after.strip_prefix(')') {
            return Ok((values, after));
        }
        let Some(after) = after.strip_prefix(',') else {
            return wrong(format!("a closing parenthesis is missing before {after:?}"));
        };
        rest = after;
    }
}

fn is_name(text: &str) -> bool {
    is_name_of(text, 63) && !text.contains('/')
}

fn is_name_of(text: &str, most: usize) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric();
    text.len() <= most && text.starts_with(ends) && text.ends_with(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> BTreeMap<String, String> {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    #[test]
    fn conditions_mean_what_kubectl_means() {
        // Selector, labels selected, labels not selected.
        for (text, yes, no) in [
            ("app=legacy", "app=legacy,x=y", "app=other"),
            ("app==legacy", "app=legacy", ""),
            ("app!=legacy", "app=other", "app=legacy"),
            ("app!=legacy", "", "app=legacy"),
            ("app", "app=", "apps=1"),
            ("!app", "apps=1", "app="),
            ("! app", "", "app=x"),
            ("app=", "app=", "app=x"),
            ("app=legacy,!weir", "app=legacy", "app=legacy,weir=x"),
            ("app=legacy , tier", "app=legacy,tier=a", "app=legacy"),
            ("app in (a, b)", "app=b", "app=c"),
            ("app in (a,)", "app=", "app=c"),
            ("app in (a)", "app=a", ""),
            ("app notin (a,b),x", "x=1", "x=1,app=a"),
            ("app notin(a)", "app=c", "app=a"),
            ("k8s.io/dns-cache=on", "k8s.io/dns-cache=on", "dns-cache=on"),
            ("in in (in)", "in=in", "in=x"),
            ("in", "in=1", "x=in"),
            ("in,notin", "in=1,notin=1", "in=1"),
        ] {
            let selector = LabelSelector::parse(text).expect(text);
            assert!(selector.selects(&labels(yes)), "{text:?} {yes:?}");
            assert!(!selector.selects(&labels(no)), "{text:?} {no:?}");
        }
    }

    #[test]
    fn what_is_no_selector_is_named() {
        for (text, named) in [
            ("", "key of a label is missing"),
            ("a,", "missing at the end"),
            (",a", "before \",a\""),
            ("a b", "before \"b\""),
            ("a in b", "parentheses is missing before \" b\""),
            ("a in (b", "closing parenthesis"),
            ("a in (b c)", "closing parenthesis is missing before \"c)\""),
            ("a>1", "before \">1\""),
            ("-a", "\"-a\" cannot be the key"),
            ("A/b=c", "\"A/b\" cannot be the key"),
            ("a/b/c", "\"a/b/c\" cannot be the key"),
            ("a=b/c", "\"b/c\" cannot be the value"),
            ("a=b-", "\"b-\" cannot be the value"),
            ("!a=b", "before \"=b\""),
        ] {
            let error = LabelSelector::parse(text).expect_err(text).to_string();
            assert!(error.contains(named), "{text:?}: {error}");
        }
        let long = "x".repeat(64);
        assert!(LabelSelector::parse(&long).is_err());
        assert!(LabelSelector::parse(&format!("a={long}")).is_err());
    }
}
