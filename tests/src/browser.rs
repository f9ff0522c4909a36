//! A real browser without a screen: Chromium, steered through its driver, which speaks HTTP and JSON.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use serde_json::{Value, json};

use crate::network::SteadyNetwork;
use crate::process::{Daemon, run};
use crate::wait::until;
use crate::{DEADLINE, is_root};

/// What WebDriver calls an element in JSON.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one window. It ends with this.
pub struct Browser {
    address: String,
    session: String,
    /// Its first process, and what tells that it is still the same.
    process: Option<(u64, String)>,
    shots: PathBuf,
    _driver: Daemon,
    _network: SteadyNetwork,
}

impl Browser {
    /// Starts one that keeps its files below `scratch`; `None` where there is none on this machine.
    ///
    /// Screenshots go to `scratch`, or to the folder `CORTEX_SCREENSHOTS`, which outlives the test.
    ///
    /// # Panics
    /// If it is there and does not start.
    #[must_use]
    pub fn start(scratch: &Path) -> Option<Self> {
        for program in ["chromium", "chromedriver"] {
            let mut look = Command::new("sh");
            if run(look.args(["-c", "command -v \"$0\"", program]), b"").code != 0 {
                return None;
            }
        }
        let network = SteadyNetwork::begin();
        let mut command = Command::new("chromedriver");
        // What the browser leaves there goes with the rest.
        command.arg("--port=0").env("TMPDIR", scratch);
        let mut driver = Daemon::start("chromedriver", &mut command, &scratch.join("driver.log"));
        let port = driver.line("its port", |line| {
            let (_, port) = line.split_once("started successfully on port ")?;
            Some(port.trim_end_matches('.').to_owned())
        });
        let address = format!("127.0.0.1:{port}");
        let profile = scratch.join("chromium").display().to_string();
        let mut arguments = vec![
            "--headless=new".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--disable-background-networking".to_owned(),
            "--disable-component-update".to_owned(),
            "--no-first-run".to_owned(),
            format!("--user-data-dir={profile}"),
        ];
        if is_root() {
            // Its own sandbox needs a user that is not root.
            arguments.push("--no-sandbox".to_owned());
        }
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            // The mesh's authority is none that browsers know.
            "acceptInsecureCerts": true,
            "goog:chromeOptions": { "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let started = ask(&address, "POST", "/session", &wanted);
        let session = started["sessionId"].as_str().expect("a session").to_owned();
        let process = started["capabilities"]["goog:processID"].as_u64().map(|id| (id, profile));
        let shots = std::env::var_os("CORTEX_SCREENSHOTS");
        let shots = shots.map_or_else(|| scratch.to_owned(), PathBuf::from);
        Some(Self { address, session, process, shots, _driver: driver, _network: network })
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        ask(&self.address, method, &format!("/session/{}{path}", self.session), body)
    }

    /// Opens an address.
    ///
    /// # Panics
    /// If it cannot be loaded.
    pub fn open(&self, url: &str) {
        let _opened = self.ask("POST", "/url", &json!({ "url": url }));
    }

    /// Asks the browser itself, in the words of its own protocol.
    ///
    /// # Panics
    /// If it refuses.
    pub fn tell(&self, command: &str, parameters: &Value) {
        let body = json!({ "cmd": command, "params": parameters });
        let _told = self.ask("POST", "/goog/cdp/execute", &body);
    }

    /// Makes the window this large.
    ///
    /// # Panics
    /// If the browser refuses.
    pub fn resize(&self, width: u32, height: u32) {
        let mobile = width < 600;
        let size = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile,
        });
        self.tell("Emulation.setDeviceMetricsOverride", &size);
    }

    /// What the body of a function says, run in the page.
    ///
    /// # Panics
    /// If it throws.
    #[must_use]
    pub fn script(&self, body: &str) -> Value {
        self.ask("POST", "/execute/sync", &json!({ "script": body, "args": [] }))
    }

    /// Waits until an expression is true in the page.
    ///
    /// # Panics
    /// If it is not before the deadline.
    pub fn wait(&self, expression: &str) {
        let body = format!("return Boolean({expression})");
        let deadline = std::time::Instant::now() + DEADLINE / 3;
        until(expression, || {
            let late = std::time::Instant::now() > deadline;
            assert!(!late, "never: {expression}\n{}\n{:?}", self.text("body"), self.said());
            self.script(&body) == true
        });
    }

    /// What is written in the first element of this selector.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn text(&self, selector: &str) -> String {
        let body = format!("return document.querySelector({}).innerText", json!(selector));
        self.script(&body).as_str().expect("an element has a text").to_owned()
    }

    fn element(&self, selector: &str) -> String {
        let by = json!({ "using": "css selector", "value": selector });
        let found = self.ask("POST", "/element", &by);
        found[ELEMENT].as_str().expect("an element").to_owned()
    }

    /// Clicks on an element, as somebody with a mouse does.
    ///
    /// # Panics
    /// If there is none, or something lies above it.
    pub fn click(&self, selector: &str) {
        let element = self.element(selector);
        let _clicked = self.ask("POST", &format!("/element/{element}/click"), &json!({}));
    }

    /// Types into an element.
    ///
    /// # Panics
    /// If there is none, or nothing can be typed there.
    pub fn type_into(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        let keys = json!({ "text": text });
        let _typed = self.ask("POST", &format!("/element/{element}/value"), &keys);
    }

    /// Keeps a picture of the whole page.
    ///
    /// # Panics
    /// If it cannot be taken or written.
    pub fn picture(&self, name: &str) {
        let picture = self.ask("GET", "/screenshot", &Value::Null);
        let picture = picture.as_str().expect("a picture in base64");
        let bytes = base64::engine::general_purpose::STANDARD.decode(picture).expect("base64");
        assert!(bytes.starts_with(b"\x89PNG"), "{name} is no picture");
        std::fs::create_dir_all(&self.shots).expect("there is room for pictures");
        std::fs::write(self.shots.join(format!("{name}.png")), bytes).expect("there is room");
    }

    /// What it has written to its console since it was last asked.
    ///
    /// # Panics
    /// If it does not say.
    #[must_use]
    pub fn said(&self) -> Vec<String> {
        let lines = self.ask("POST", "/se/log", &json!({ "type": "browser" }));
        let lines = lines.as_array().expect("a list").iter();
        lines.map(|line| line["message"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends the browser, and says so when it has.
        let path = format!("/session/{}", self.session);
        let ended = exchange(&self.address, "DELETE", &path, &Value::Null);
        let Some((id, profile)) = &self.process else { return };
        let line = std::fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default();
        // It did not, and the number is still that browser's.
        if ended.is_err() && line.contains(profile.as_str()) {
            let mut kill = Command::new("kill");
            drop(kill.args(["-9", &id.to_string()]).status());
        }
    }
}

/// Asks the driver, which has to do it.
fn ask(address: &str, method: &str, path: &str, body: &Value) -> Value {
    let answer = exchange(address, method, path, body);
    let mut answer = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
    let value = answer["value"].take();
    assert!(value["error"].is_null(), "{method} {path} {body}: {value:#}");
    value
}

fn exchange(address: &str, method: &str, path: &str, body: &Value) -> std::io::Result<Value> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(std::io::Error::other)?;
        }
    }
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(std::io::Error::other)
}
