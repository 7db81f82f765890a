//! A database in a VM that tells the host of each row when it is committed.

use super::world::{Docker, PATIENCE};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};

/// Where the database is on the data disk.
pub const FILES: &str = "docker/volumes/ledger/_data";

/// Writes rows with the numbers that follow those that are there. A row is printed when its transaction is synced, and the terminal has
/// each line leave the program at once.
const WRITE: &str = "
    sqlite3 /v/db 'pragma journal_mode=wal; create table if not exists t(n integer primary key);' > /dev/null
    i=$(sqlite3 /v/db 'select coalesce(max(n), 0) from t')
    (echo 'pragma synchronous=full;'
     while true; do i=$((i + 1)); echo \"insert into t values($i); select $i;\"; done) | sqlite3 -bail /v/db";

/// What asks a database whether it is whole, and then for its rows.
pub const QUERY: &str = "pragma integrity_check; select count(*), max(n) from t;";

/// A container that writes rows.
pub struct Ledger {
    client: Child,
    rows: Receiver<u32>,
}

impl Ledger {
    /// Starts it; the image `sqlite` is there.
    pub fn open(docker: &Docker) -> Self {
        let run = ["run", "-t", "--rm", "--network", "none", "-v", "ledger:/v"];
        let mut command = docker.command(&[&run[..], &["sqlite", "sh", "-c", WRITE]].concat());
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut client = command.spawn().expect("docker");
        let output = client.stdout.take().expect("a pipe");
        let (sender, rows) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // Others are pragmas' answers, or cut off.
                if let Ok(row) = line.trim().parse()
                    && sender.send(row).is_err()
                {
                    return;
                }
            }
        });
        Self { client, rows }
    }

    /// The next row that is committed.
    #[track_caller]
    pub fn next(&self) -> u32 {
        self.rows.recv_timeout(PATIENCE).expect("a committed row")
    }

    /// Waits for the end of its VM; returns the last row that was committed since [`Self::next`].
    pub fn end(mut self) -> Option<u32> {
        self.client.wait().expect("wait for docker");
        self.rows.iter().last()
    }
}

/// Checks what the database answered to [`QUERY`]: it is whole, and has all rows up to `acknowledged`, and none is missing.
#[track_caller]
pub fn check(answer: &str, acknowledged: u32, when: &str) {
    let rows = answer.trim().strip_prefix("ok\n").and_then(|rows| {
        let (count, last) = rows.split_once('|')?;
        Some((count.parse::<u32>().ok()?, last.parse::<u32>().ok()?))
    });
    let Some((count, last)) = rows else {
        panic!("{when}: {answer}");
    };
    assert!(
        count == last && last >= acknowledged,
        "{when}: row {acknowledged} was acknowledged, and there are {count} up to {last}"
    );
}
