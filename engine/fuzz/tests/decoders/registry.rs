//! Registry versions: the exchange with peers, signatures, documents, and the texts in them.

use millrace_edge_policy::rules::{Bounds, Locality, RuleSet, compile, in_order};
use millrace_edge_policy::settings::{
    Caps, DefaultAction, Kind, Limits, Mode, Scope, Service, Settings,
};
use millrace_fuzz::{Seed, target};
use millrace_protocol::address::NodeAddress;
use millrace_protocol::id::{ArtifactId, IdError, NodeId, SubnetId};
use millrace_protocol::identity::{PublicKey, SIGNATURE_BYTES};
use millrace_protocol::names::Names;
use millrace_protocol::registry::{
    NUMBER_MAX, NodeRecord, RegistryConfig, RegistryVersion, SignedVersion, SubnetRecord,
};
use millrace_protocol::topology::Topology;
use millrace_registry::wire;
use millrace_testkit::ids::key;

use crate::{assert_label, refused};

/// The registry's key.
const REGISTRY: u8 = 200;

fn subnet() -> SubnetId {
    SubnetId::from_public_key_der(&key(9).public_key().to_spki_der())
}

/// A version with one of everything.
fn version(number: u64) -> RegistryVersion {
    let node = |seed, addresses: &[&str]| {
        let public_key = key(seed).public_key();
        let addresses = addresses.iter().map(|text| text.parse().unwrap());
        NodeRecord::new(public_key, subnet(), addresses.collect())
    };
    // One whose key rotates.
    let mut rotating = node(2, &["node.example:4100"]);
    rotating.tls_keys = rotating.tls_keys.begin(key(3).public_key()).unwrap();
    let settings: toml::Table = "limit = 5\nratio = 0.5\nlist = [1, 2]\n".parse().unwrap();
    let rule = r#"
        scope = "global"
        prefixes = ["192.0.2.0/24", "2001:db8::/32"]
        ports = [80, "1000-2000"]
        protocol = "tcp"
        action = "allow"
        comment = "documentation"
    "#;
    RegistryVersion {
        number,
        subnets: vec![SubnetRecord {
            id: subnet(),
            name: Some("north".into()),
            settings: settings.clone(),
        }],
        nodes: vec![node(1, &["192.0.2.1:4100", "[2001:db8::1]:4100"]), rotating],
        firewall: vec![rule.parse().unwrap()],
        settings,
        skipped: Vec::new(),
    }
}

fn signed(number: u64) -> SignedVersion {
    SignedVersion::sign(version(number).to_document(), &key(REGISTRY))
}

fn questions() -> Vec<Seed> {
    vec![Seed::new("number", wire::encode_number(12))]
}

target!(
    /// Protects the answers to questions: one has exactly its form.
    registry_question, questions, |bytes| {
        let number = wire::decode_number(bytes);
        assert_eq!(number.is_some(), bytes.len() == 8);
        if let Some(number) = number {
            assert_eq!(wire::encode_number(number)[..], *bytes);
        }
        number.is_some()
    }
);

fn answers() -> Vec<Seed> {
    let empty = SignedVersion {
        document: String::new(),
        signature: [9; SIGNATURE_BYTES],
    };
    let most = vec![empty; wire::ANSWER_VERSIONS_MAX];
    vec![
        Seed::new("none", wire::encode([].iter())),
        Seed::new("two", wire::encode([signed(1), signed(2)].iter())),
        Seed::new("most", wire::encode(most.iter())),
    ]
}

target!(
    /// Protects memory: an answer has the versions that its bytes hold, within its bounds.
    registry_answer, answers, |bytes| {
        let Some(versions) = wire::decode(bytes) else {
            return false;
        };
        assert!(bytes.len() <= wire::ANSWER_BYTES_MAX);
        assert!(versions.len() <= wire::ANSWER_VERSIONS_MAX);
        assert!(versions.capacity() <= wire::ANSWER_VERSIONS_MAX);
        assert_eq!(wire::encode(versions.iter()), bytes);
        true
    }
);

/// The signature, then the document.
fn signatures() -> Vec<Seed> {
    let seed =
        |name,
         SignedVersion {
             document,
             signature,
         }| { Seed::new(name, [&signature[..], document.as_bytes()].concat()) };
    let minimal = SignedVersion::sign("number = 1".into(), &key(REGISTRY));
    vec![seed("minimal", minimal), seed("full", signed(3))]
}

target!(
    /// Protects a node: it follows documents that the registry's key signed, of a bounded length,
    /// and no others.
    registry_signature, signatures, |bytes| {
        let Some((signature, document)) = bytes.split_first_chunk() else {
            return false;
        };
        let Ok(document) = str::from_utf8(document) else {
            return false;
        };
        let offered = SignedVersion {
            document: document.to_owned(),
            signature: *signature,
        };
        let files = SignedVersion::from_files(document.to_owned(), &offered.signature_hex());
        assert_eq!(files.as_ref(), Ok(&offered));
        let config = RegistryConfig {
            document_bytes_max: 2_000,
            ..RegistryConfig::default()
        };
        let right = SignedVersion::sign(document.to_owned(), &key(REGISTRY));
        assert!(offered.verify(&key(1).public_key(), &config).is_err());
        match offered.verify(&key(REGISTRY).public_key(), &config) {
            Ok(_) => {
                assert_eq!(offered, right, "Ed25519 signs the same with the same");
                assert!(document.len() <= config.document_bytes_max);
                true
            }
            Err(error) => refused(error.reason()),
        }
    }
);

fn documents() -> Vec<Seed> {
    let skipped = r#"
        number = 7
        nodes = [1, {}, { id = "aaaaa-aa" }]
        subnets = "none"
        firewall = [2, { scope = "global", action = "deny" }]
        later = "a key of a later version"
    "#;
    let rules = r#"
        number = 999_999_999_999
        [[firewall]]
        scope = "node:x"
        direction = "outbound"
        user = "replica"
        action = "reject"
        [[firewall]]
        scope = "role:boundary"
        ports = ["1-65535"]
        protocol = "udp"
        action = "deny"
    "#;
    vec![
        Seed::new("minimal", "number = 1"),
        Seed::new("full", version(12).to_document()),
        Seed::new("skipped", skipped),
        Seed::new("rules", rules),
    ]
}

fn settings() -> Settings {
    Settings {
        mode: Mode::Enforce,
        scope: Scope::Host,
        services: vec![Service {
            port: 4_100,
            kind: Kind::Quic,
            default_action: DefaultAction::Deny,
        }],
        host_default: DefaultAction::Deny,
        limits: Limits::default(),
        caps: Caps::default(),
    }
}

target!(
    /// Protects a node from its registry's author: what cannot be read is skipped with a reason,
    /// and what is read is written as it reads.
    registry_document, documents, |bytes| {
        let Ok(text) = str::from_utf8(bytes) else {
            return false;
        };
        let version = match RegistryVersion::parse(text) {
            Ok(version) => version,
            Err(error) => return refused(error.reason()),
        };
        assert!((1..=NUMBER_MAX).contains(&version.number));
        for skipped in &version.skipped {
            assert_label(skipped.reason);
            assert!(!skipped.detail.is_empty());
        }
        for node in &version.nodes {
            assert_eq!(node.public_key.node_id(), node.id);
            assert!(!node.addresses.is_empty());
        }
        let document = version.to_document();
        let again = RegistryVersion::parse(&document).unwrap();
        assert!(again.skipped.is_empty(), "{:?}", again.skipped);
        assert_eq!(again.nodes, version.nodes);
        // Not the values: a setting may be NaN, which is no value's equal.
        assert_eq!(again.to_document(), document);

        let members = Topology::union(&subnet(), [&version], &Names::default());
        assert!(members.len() <= version.nodes.len());
        let set = match RuleSet::read(version.number, &version.firewall) {
            Ok(set) => set,
            Err(error) => return refused(error.reason()),
        };
        let rules = in_order(&[], [], &set, &Locality::default(), 0);
        let bounds = Bounds {
            rules_max: 8,
            nodes4_max: 64,
            nodes6_max: 64,
        };
        match compile(&settings(), &rules, bounds) {
            Ok(compiled) => {
                assert!(compiled.rules.len() <= bounds.rules_max);
                true
            }
            Err(error) => refused(error.reason()),
        }
    }
);

fn addresses() -> Vec<Seed> {
    vec![
        Seed::new("ipv4", "192.0.2.1:4100"),
        Seed::new("ipv6", "[2001:db8::1]:4100"),
        Seed::new("mapped", "[::ffff:192.0.2.1]:4100"),
        Seed::refused("scoped", "[fe80::1%2]:4100"),
        Seed::new("name", "Node-7.example.:4100"),
    ]
}

target!(
    /// Protects a registry's readers: an address means the same however often it is written down.
    node_address, addresses, |bytes| {
        let Ok(text) = str::from_utf8(bytes) else {
            return false;
        };
        match text.parse::<NodeAddress>() {
            Ok(address) => {
                let port = match &address {
                    NodeAddress::Ip(address) => address.port(),
                    NodeAddress::Name { port, .. } => *port,
                };
                assert_ne!(port, 0);
                assert_eq!(address.to_string().parse(), Ok(address));
                true
            }
            Err(error) => {
                assert!(!error.to_string().is_empty() && !error.fix().is_empty());
                false
            }
        }
    }
);

fn names() -> Vec<Seed> {
    vec![
        Seed::new("node", key(1).node_id().to_string()),
        Seed::new("subnet", subnet().to_string()),
        Seed::new("hex", key(1).public_key().to_string()),
    ]
}

target!(
    /// Protects comparisons of names as texts: each name has one text.
    name, names, |bytes| {
        let Ok(text) = str::from_utf8(bytes) else {
            return false;
        };
        let read: [Result<String, IdError>; 4] = [
            text.parse().map(|id: NodeId| id.to_string()),
            text.parse().map(|id: SubnetId| id.to_string()),
            text.parse().map(|id: ArtifactId| id.to_string()),
            text.parse().map(|key: PublicKey| key.to_string()),
        ];
        for name in &read {
            match name {
                Ok(written) => assert_eq!(written, text),
                Err(error) => assert_label(error.reason()),
            }
        }
        read.iter().any(Result::is_ok)
    }
);
