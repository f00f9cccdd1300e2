//! Runs the binary under test.
#![allow(dead_code, reason = "each test crate uses a part of it")]
#![allow(unreachable_pub, reason = "shared by test crates")]
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

pub mod load;
pub mod namespace;
pub mod process;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

pub use millrace_testkit::{PATIENCE, eventually, skip};

/// How loopback addresses begin that no other test has, and no other run of this one beside it.
pub fn own_addresses() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const TESTS: u32 = 16;
    let number = std::process::id() * TESTS + NEXT.fetch_add(1, Ordering::Relaxed) % TESTS;
    let [_, _, high, low] = number.to_be_bytes();
    // Not 127.0: that is where everybody else is.
    format!("127.{}.{low}.", high.max(1))
}

/// `millrace` with arguments.
pub fn millrace(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(args)
        .output()
        .unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The output of a command that must succeed.
pub fn ok(args: &[&str]) -> String {
    let output = millrace(args);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{args:?}: {}",
        stderr(&output)
    );
    stdout(&output)
}

/// The one JSON document of a command that must succeed.
pub fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&ok(args)).unwrap()
}

/// Makes a key file; the node's id, and its public key.
pub fn keygen(file: &Path) -> (String, String) {
    let made = json(&["keygen", text(file), "--json"]);
    let [id, key] = ["node_id", "public_key"].map(|field| made[field].as_str().unwrap().to_owned());
    (id, key)
}

/// A node of a test subnet: its folder, its config, and its process while it runs.
#[derive(Debug)]
pub struct TestNode {
    pub node_id: String,
    pub public_key: String,
    pub config: PathBuf,
    pub socket: PathBuf,
    /// What it said until it listened, the last time it started.
    pub said: Vec<String>,
    /// What it said since then.
    pub says: Arc<Mutex<Vec<String>>>,
    process: Option<Child>,
}

/// A registry folder with its key.
#[derive(Debug)]
pub struct TestRegistry {
    pub dir: PathBuf,
    pub key: PathBuf,
    pub public_key: String,
}

impl TestRegistry {
    pub fn init(folder: &Path) -> Self {
        let (dir, key) = (folder.join("registry"), folder.join("registry.key"));
        let made = json(&[
            "registry",
            "init",
            text(&dir),
            "--key",
            text(&key),
            "--json",
        ]);
        Self {
            public_key: made["public_key"].as_str().unwrap().to_owned(),
            dir,
            key,
        }
    }

    /// `millrace registry COMMAND` on this folder, with its key.
    pub fn run(&self, command: &str, arguments: &[&str]) -> Output {
        let (dir, key) = (text(&self.dir), text(&self.key));
        millrace(&[&["registry", command, dir, "--key", key], arguments].concat())
    }

    /// As [`Self::run`], and it must succeed.
    pub fn run_ok(&self, command: &str, arguments: &[&str]) {
        let output = self.run(command, arguments);
        let (code, stderr) = (output.status.code(), stderr(&output));
        assert_eq!(code, Some(0), "{command} {arguments:?}: {stderr}");
    }

    /// Adds a node, or moves it.
    pub fn add_key(&self, public_key: &str, address: &str) -> Output {
        let arguments = ["--public-key", public_key, "--address", address];
        self.run("add-node", &arguments)
    }

    pub fn add(&self, node: &TestNode, address: &str) {
        let output = self.add_key(&node.public_key, address);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    pub fn remove(&self, node: &TestNode) {
        self.run_ok("remove-node", &[&node.node_id]);
    }

    /// Adds all these nodes in one version, in the registry's only subnet.
    pub fn add_all(&self, nodes: &[(TestNode, String)]) {
        let members = nodes.iter().map(|(node, address)| {
            let (id, key) = (node.node_id.clone(), node.public_key.clone());
            (id, key, address.clone())
        });
        self.add_members(members);
    }

    /// As [`Self::add_all`], by node id, public key and address.
    pub fn add_members(&self, members: impl IntoIterator<Item = (String, String, String)>) {
        self.publish(|document| {
            let subnet = document["subnets"][0]["id"].clone();
            let records = members.into_iter().map(|(id, public_key, address)| {
                let mut record = toml::Table::new();
                record.insert("addresses".into(), vec![address].into());
                record.insert("id".into(), id.into());
                record.insert("public_key".into(), public_key.into());
                record.insert("subnet".into(), subnet.clone());
                toml::Value::Table(record)
            });
            let records: Vec<toml::Value> = records.collect();
            document.insert("nodes".into(), records.into());
        });
    }

    /// Signs a version that differs from the newest by its firewall alone: `[[firewall]]` tables in
    /// TOML. Its number.
    pub fn set_firewall(&self, rules: &str) -> u64 {
        self.publish(|document| {
            document.remove("firewall");
            document.extend(rules.parse::<toml::Table>().unwrap());
        })
    }

    /// Signs the newest version with a change. Its number.
    fn publish(&self, change: impl FnOnce(&mut toml::Table)) -> u64 {
        let documents = std::fs::read_dir(&self.dir)
            .unwrap()
            .map(|e| e.unwrap().path());
        let newest = documents
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "toml")
            })
            .max()
            .unwrap();
        let newest = std::fs::read_to_string(newest).unwrap();
        let mut document = newest.parse::<toml::Table>().unwrap();
        let number = document["number"].as_integer().unwrap() + 1;
        document.insert("number".into(), number.into());
        change(&mut document);
        let file = self.dir.with_extension("next.toml");
        std::fs::write(&file, document.to_string()).unwrap();
        self.run_ok("sign", &[text(&file)]);
        number.try_into().unwrap()
    }
}

impl TestNode {
    /// Key and config of a node that listens on port 4100 of `ip`; `extra` follows `[registry]`.
    pub fn new(folder: &Path, registry: &TestRegistry, ip: &str, extra: &str) -> Self {
        Self::with_config(
            folder,
            &format!(
                "[node]\nstate_dir = \".\"\n[listen]\naddress = \"{ip}:4100\"\n[admin]\nheader_timeout = \"30s\"\n\
                 body_timeout = \"30s\"\nconnections_max = 4\n\
                 [artifacts]\nstore_bytes = \"16MiB\"\n[shards]\ncores = [0]\nspin = \"0s\"\n\
                 chunk_pool_bytes = \"48MiB\"\nhuge_pages = \"never\"\n\
                 [transport]\npath = \"lan\"\n\
                 receive_budget_bytes = \"32MiB\"\nreceive_budget_peer_bytes = \"32MiB\"\n\
                 body_bytes_max = \"16MiB\"\n\
                 [registry]\npoll_interval = \"50ms\"\npublic_key = \"{}\"\n{extra}",
                registry.public_key
            ),
        )
    }

    /// Key and config of a node that follows the shared folder. All but these `sections` are
    /// defaults.
    #[allow(dead_code, reason = "shared by test crates")]
    pub fn with_sections(
        folder: &Path,
        registry: &TestRegistry,
        address: &str,
        sections: &str,
    ) -> Self {
        let (dir, key) = (&registry.dir, &registry.public_key);
        Self::with_config(
            folder,
            &format!(
                "[node]\nstate_dir = \".\"\n[listen]\naddress = \"{address}\"\n\
                 [registry]\ndir = {dir:?}\npublic_key = \"{key}\"\n{sections}"
            ),
        )
    }

    fn with_config(folder: &Path, words: &str) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let (node_id, public_key) = keygen(&folder.join("node.key"));
        let config = folder.join("node.toml");
        std::fs::write(&config, words).unwrap();
        Self {
            node_id,
            public_key,
            config,
            socket: folder.join("admin.sock"),
            said: Vec::new(),
            says: Arc::default(),
            process: None,
        }
    }

    /// Writes other words into the config.
    #[allow(dead_code, reason = "shared by test crates")]
    pub fn edit(&self, from: &str, to: &str) {
        let config = std::fs::read_to_string(&self.config).unwrap();
        assert!(config.contains(from), "{config}");
        std::fs::write(&self.config, config.replace(from, to)).unwrap();
    }

    /// What `check --json` says of the config.
    #[allow(dead_code, reason = "shared by test crates")]
    pub fn check_json(&self) -> serde_json::Value {
        let output = millrace(&["check", "--config", text(&self.config), "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Starts the process and waits until its admin socket answers.
    pub fn start(&mut self) {
        self.start_by(Command::new(env!("CARGO_BIN_EXE_millrace")));
    }

    /// As [`Self::start`], by a command that lacks the arguments of `millrace`.
    pub fn start_by(&mut self, millrace: Command) {
        // What it says later must not fill the pipe.
        let lines = self.start_unread(millrace).lines();
        let says = Arc::new(Mutex::new(Vec::new()));
        self.says = Arc::clone(&says);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                says.lock().unwrap().push(line);
            }
        });
    }

    /// As [`Self::start_by`], but what the node says after its start stays in the pipe.
    pub fn start_unread(&mut self, mut millrace: Command) -> BufReader<ChildStderr> {
        let process = millrace
            .args(["node", "--config", text(&self.config)])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let process = self.process.insert(process);
        // The line that names the admin socket comes when everything has started.
        let mut reader = BufReader::new(process.stderr.take().unwrap());
        self.said.clear();
        loop {
            let mut line = String::new();
            let length = reader.read_line(&mut line).unwrap();
            assert!(length > 0, "the node ended: {:?}", self.said);
            self.said.push(line.trim_end().to_owned());
            if line.contains("listens on") {
                return reader;
            }
        }
    }

    /// The number of the process.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// Ends the process as a service manager would; its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut process = self.process.take().unwrap();
        let kill = Command::new("kill")
            .args(["-TERM", &process.id().to_string()])
            .status()
            .unwrap();
        assert!(kill.success());
        process.wait().unwrap().code()
    }

    /// Ends the process as a power cut would.
    pub fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// One raw request, the whole raw answer.
    pub fn raw(&self, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Status line's code and the body of a GET.
    pub fn get(&self, path: &str) -> (u16, String) {
        let answer = self.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/status").1).unwrap()
    }

    /// Makes a TLS key beside the node's key; the key.
    pub fn make_tls_key(&self) -> String {
        let identity = self.config.with_file_name("node.key");
        let made = json(&["keygen", "--tls", text(&identity), "--json"]);
        assert_eq!(made["node_id"], *self.node_id);
        made["tls_key"].as_str().unwrap().to_owned()
    }

    /// The connection number of a peer, if it is up.
    pub fn connection_to(&self, peer: &Self) -> Option<u64> {
        let status = self.status();
        let peers = status["peers"].as_array().unwrap();
        peers
            .iter()
            .find(|p| p["node_id"] == *peer.node_id)
            .and_then(|p| p["connection"].as_u64())
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
