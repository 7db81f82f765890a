//! A headless Chromium, spoken to by the DevTools protocol over a pair of pipes: JSON, each message ended by a zero byte.

use command_fds::{CommandFdExt, FdMapping};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

/// The program, from Debian's package of this name.
const PROGRAM: &str = "chromium-headless-shell";

/// How a page is shown.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Of the window, CSS pixels.
    pub width: u32,
    /// In the dark theme.
    pub dark: bool,
    /// As on paper.
    pub print: bool,
}

/// A browser with one page. It ends when dropped.
pub struct Browser {
    child: Child,
    writer: PipeWriter,
    reader: BufReader<PipeReader>,
    session: Option<String>,
    last_id: u64,
    events: Vec<Value>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts it.
    pub fn start() -> Self {
        let profile = tempfile::tempdir().expect("a folder for the browser");
        let (theirs_in, writer) = io::pipe().expect("a pipe");
        let (reader, theirs_out) = io::pipe().expect("a pipe");
        let mut command = Command::new(PROGRAM);
        command
            // The tests may run as root, where Chromium has no sandbox; the pages are the project's own.
            .args([
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let descriptor = |parent_fd: OwnedFd, child_fd| FdMapping { parent_fd, child_fd };
        let mappings = vec![descriptor(theirs_in.into(), 3), descriptor(theirs_out.into(), 4)];
        command
            .fd_mappings(mappings)
            .expect("descriptors for the browser");
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {PROGRAM}: {error}; apt-get install {PROGRAM}"));
        // It holds the pipes' other ends, too.
        drop(command);
        let mut browser = Self {
            child,
            writer,
            reader: BufReader::new(reader),
            session: None,
            last_id: 0,
            events: vec![],
            _profile: profile,
        };
        let target = browser.ask("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.ask("Target.attachToTarget", attach);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.ask(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Loads a page, and evaluates an expression in it.
    pub fn look(&mut self, url: &str, look: Look, expression: &str) -> Value {
        let metrics = json!({ "width": look.width, "height": 800, "deviceScaleFactor": 1, "mobile": false });
        self.ask("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = if look.dark { "dark" } else { "light" };
        let media = json!({
            "media": if look.print { "print" } else { "screen" },
            "features": [{ "name": "prefers-color-scheme", "value": scheme }],
        });
        self.ask("Emulation.setEmulatedMedia", media);
        let loads = |event: &Value| event["method"] == "Page.loadEventFired";
        let before = self.events.iter().filter(|event| loads(event)).count();
        let went = self.ask("Page.navigate", json!({ "url": url }));
        assert!(went["errorText"].is_null(), "{url}: {went}");
        while self.events.iter().filter(|event| loads(event)).count() == before {
            let event = self.read();
            self.events.push(event);
        }
        let evaluate = json!({ "expression": expression, "returnByValue": true });
        let answer = self.ask("Runtime.evaluate", evaluate);
        assert!(answer["exceptionDetails"].is_null(), "{answer}");
        answer["result"]["value"].clone()
    }

    /// The length of the page as a PDF, in base64.
    pub fn pdf_length(&mut self) -> usize {
        let pdf = self.ask("Page.printToPDF", json!({}));
        pdf["data"].as_str().map_or(0, str::len)
    }

    /// What was written to the console so far, and what failed.
    pub fn complaints(&self) -> Vec<String> {
        let methods = [
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
        ];
        let complains = |event: &&Value| methods.iter().any(|method| event["method"] == *method);
        self.events
            .iter()
            .filter(complains)
            .map(Value::to_string)
            .collect()
    }

    /// The addresses that were asked for so far.
    pub fn asked(&self) -> Vec<&str> {
        let requests = self
            .events
            .iter()
            .filter(|event| event["method"] == "Network.requestWillBeSent");
        requests
            .filter_map(|event| event["params"]["request"]["url"].as_str())
            .collect()
    }

    fn ask(&mut self, method: &str, params: Value) -> Value {
        self.last_id += 1;
        let mut message = json!({ "id": self.last_id, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let message = format!("{message}\0");
        self.writer
            .write_all(message.as_bytes())
            .expect("the browser is gone");
        loop {
            let answer = self.read();
            if answer["id"] == self.last_id {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push(answer);
        }
    }

    fn read(&mut self) -> Value {
        let mut message = vec![];
        self.reader
            .read_until(0, &mut message)
            .expect("a message of the browser");
        assert_eq!(message.pop(), Some(0), "the browser ended");
        serde_json::from_slice(&message).expect("JSON of the browser")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its helpers end when it does. Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
