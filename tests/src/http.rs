//! As much of HTTP as asking for a health check takes: one GET, the whole answer.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::netns::NetNs;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header fields; names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Body, which is JSON.
    pub body: Value,
}

/// Asks `to` for `path`, from a namespace. The inner error is that of the connection.
///
/// # Errors
///
/// When what comes back is no answer.
pub fn get(from: &NetNs, to: SocketAddr, path: &str) -> Result<io::Result<Answer>> {
    from.run(|| match exchange(to, path) {
        Ok(text) => Ok(Ok(parse(&text).with_context(|| format!("{to}: {text:?}"))?)),
        Err(error) => Ok(Err(error)),
    })
}

fn exchange(to: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn parse(text: &str) -> Result<Answer> {
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the head")?;
    let mut lines = head.lines();
    let first = lines.next().context("no status line")?;
    let mut words = first.split(' ');
    ensure!(words.next() == Some("HTTP/1.1"), "another protocol");
    let status = words.next().context("no status")?.parse()?;
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    Ok(Answer {
        status,
        headers,
        body: serde_json::from_str(body)?,
    })
}
