//! What the commands print: short coloured lines on a terminal, plain ones otherwise, and signs of life of
//! everything that takes longer than two seconds.

use std::{
    io::{BufRead as _, BufReader, IsTerminal as _, Read, Write as _},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Between two signs of life on a terminal, and elsewhere.
const TERMINAL_TICK: Duration = Duration::from_millis(200);
const PLAIN_TICK: Duration = Duration::from_secs(15);
/// Lines of output shown of a command that failed.
const TAIL: usize = 30;

/// A colour of text.
#[derive(Clone, Copy, Debug)]
pub enum Colour {
    /// What ends.
    Red = 31,
    /// What went well.
    Green = 32,
    /// What happens.
    Yellow = 33,
    /// Headings.
    Cyan = 36,
    /// Details.
    Grey = 90,
}

/// Text in a colour when standard output is a terminal that wants colours.
pub fn paint(colour: Colour, text: &str) -> String {
    if is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{}m{text}\x1b[0m", colour as u8)
    } else {
        text.to_owned()
    }
}

/// Whether people watch standard output.
pub fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// A line: a coloured word of at most nine letters, then text.
pub fn line(colour: Colour, word: &str, text: &str) {
    // Who reads may have seen enough (`| head`): no reason to stop the work.
    let _ = writeln!(
        std::io::stdout(),
        "{} {text}",
        paint(colour, &format!("{word:>9}"))
    );
}

/// An error at the end of a command.
pub fn error(text: &str) {
    // Standard error may be a file while standard output is a terminal; the word is enough there.
    if std::io::stderr().is_terminal() {
        eprintln!("\x1b[31merror\x1b[0m: {text}");
    } else {
        eprintln!("error: {text}");
    }
}

/// Runs a command with its output hidden, showing that it lives, and shows the output's end if it fails.
pub fn run_quietly(what: &str, command: &mut Command) -> Result<()> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{what}: cannot run {command:?}"))?;
    let lines = Arc::new(Mutex::new(Vec::new()));
    let readers = [
        follow(child.stdout.take().context("no output")?, lines.clone()),
        follow(child.stderr.take().context("no output")?, lines.clone()),
    ];
    let mut life = Life::new(what);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        life.show(lines.lock().unwrap_or_else(PoisonError::into_inner).last());
        thread::sleep(Duration::from_millis(20));
    };
    life.end();
    for reader in readers {
        let _ = reader.join();
    }
    if status.success() {
        if start.elapsed() > Duration::from_secs(2) {
            let text = format!("{what} ({})", seconds(start.elapsed()));
            line(Colour::Green, "done", &text);
        }
        return Ok(());
    }
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let tail = &lines[lines.len().saturating_sub(TAIL)..];
    bail!(
        "{what}: {command:?} ended with {status}\n{}",
        tail.join("\n")
    )
}

fn follow(from: impl Read + Send + 'static, to: Arc<Mutex<Vec<String>>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            to.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    })
}

/// Signs of life of something that takes its time: a line that changes on a terminal, a new line now and then elsewhere.
pub struct Life<'a> {
    what: &'a str,
    start: Instant,
    shown: Instant,
    drawn: bool,
}

impl<'a> Life<'a> {
    /// Of something that starts now.
    pub fn new(what: &'a str) -> Self {
        let now = Instant::now();
        Self {
            what,
            start: now,
            shown: now,
            drawn: false,
        }
    }

    /// Shows a sign if it is time for one; to be called often.
    pub fn show(&mut self, detail: Option<&String>) {
        let terminal = is_terminal();
        let tick = if terminal { TERMINAL_TICK } else { PLAIN_TICK };
        if self.shown.elapsed() < tick {
            return;
        }
        self.shown = Instant::now();
        let time = seconds(self.start.elapsed());
        if terminal {
            self.drawn = true;
            let detail: String = detail.map_or("", |d| d.trim()).chars().take(60).collect();
            let word = paint(Colour::Yellow, &format!("{time:>9}"));
            print!(
                "\r\x1b[K{word} {} {}",
                self.what,
                paint(Colour::Grey, &detail)
            );
            // A line that could not be drawn is drawn the next time.
            let _ = std::io::stdout().flush();
        } else {
            println!("{time:>9} {} …", self.what);
        }
    }

    /// Takes the changing line away.
    pub fn end(&self) {
        if self.drawn {
            print!("\r\x1b[K");
            let _ = std::io::stdout().flush();
        }
    }
}

/// A duration for people.
pub fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
