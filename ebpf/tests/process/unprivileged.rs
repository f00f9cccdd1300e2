//! A node that gives up its capabilities: what it can still do with the descriptors that it holds,
//! and what its helper does for it.

use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use caps::CapSet;
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::{MapHandle, MapType};
use millrace_edge::counts::Counts;
use millrace_edge::edge::Edge;
use millrace_edge::frame::{Description, Shape};
use millrace_edge::helper::{Helper, HelperError, Request, Setup};
use millrace_edge::interface::AttachMode;
use millrace_edge::load::{LoadError, Loaded};
use millrace_edge::maps::Table;
use millrace_edge::nft::{self, Nft, NftRequest};
use millrace_edge::pins::Pins;
use millrace_edge::privileges::{NEEDED, drop_capabilities, missing};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::Mode;

use crate::sets::{PORT, options, set, sizes};

pub(crate) fn node(pins: Pins) {
    let mut edge = Edge::attach(&pins, &options(AttachMode::Native)).unwrap();
    let loaded = edge.load_beside().unwrap();
    // The helper attaches it again.
    edge.detach_interface("mr0").unwrap();
    let setup = Setup {
        pins: pins.clone(),
        nft: Nft::default(),
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("helper").stdout(Stdio::null());
    let helper = Helper::start(command, &setup).unwrap();

    drop_capabilities(&[]).unwrap();
    for set in [
        CapSet::Effective,
        CapSet::Permitted,
        CapSet::Inheritable,
        CapSet::Ambient,
    ] {
        assert!(caps::read(None, set).unwrap().is_empty(), "{set:?}");
    }
    assert!(caps::read(None, CapSet::Bounding).unwrap().is_empty());
    assert_eq!(missing(), NEEDED);
    can_use_what_it_holds(edge, &loaded);
    cannot_make_anything_new();
    asks_its_helper(&helper, &pins);
}

fn can_use_what_it_holds(mut edge: Edge, loaded: &Loaded) {
    for confirm_within in [None, Some(Duration::from_secs(600))] {
        edge.publish(&set(Mode::Enforce, RuleAction::Allow), 2, confirm_within)
            .unwrap();
    }
    edge.confirm().unwrap();

    let source: IpAddr = [192, 0, 2, 1].into();
    let map = MapHandle::try_from(edge.maps().quic_sources()).unwrap();
    let counts = Counts::new(map, 9).unwrap();
    counts.opened(source);
    assert_eq!((counts.sources(), counts.missed()), (1, 0));
    assert!(Table::<millrace_edge::abi::EdgeBucket>::map(edge.maps().handle("limiter")).is_ok());

    let from = (source, 1_024).into();
    let packet = Description {
        from,
        to_port: PORT,
        shape: Shape::Udp,
        payload_bytes: None,
    };
    let trace = edge.trace(&packet.frame()).unwrap();
    assert_eq!(
        (trace.reason, trace.connections.quic),
        (Reason::FirewallDefault, 1)
    );

    // Programs that were loaded before replace the running ones.
    edge.replace(loaded).unwrap();
    assert_eq!(
        edge.trace(&packet.frame()).unwrap().reason,
        Reason::FirewallDefault
    );
}

fn cannot_make_anything_new() {
    let options = bpf_map_create_opts {
        sz: size_of::<bpf_map_create_opts>() as u64,
        ..Default::default()
    };
    let map = MapHandle::create(MapType::Array, Some("mr_test"), 4, 4, 1, &options);
    assert_eq!(
        map.unwrap_err().kind(),
        libbpf_rs::ErrorKind::PermissionDenied
    );
    let error = Loaded::load(&sizes()).unwrap_err();
    assert!(
        matches!(error, LoadError::Refused { .. } | LoadError::Open { .. }),
        "{error}"
    );
    assert!(Nft::default().apply(&table()).is_err());
}

fn table() -> nft::Table {
    nft::Table::of(&set(Mode::Enforce, RuleAction::Allow))
}

fn asks_its_helper(helper: &Helper, pins: &Pins) {
    helper.nft(&NftRequest::Apply(table())).unwrap();
    assert!(helper.nft(&NftRequest::Look).unwrap().is_some());
    let attach = |interface: &str| {
        helper.request(&Request::Attach {
            interface: interface.into(),
            mode: AttachMode::Native,
        })
    };
    let error = attach("nowhere").unwrap_err();
    let HelperError::Refused { message, .. } = &error else {
        panic!("{error}")
    };
    assert!(message.contains("nowhere"), "{message}");
    attach("mr0").unwrap();

    // The owner of the folder may use the pins.
    let edge = Edge::adopt(pins).unwrap();
    edge.publish(&set(Mode::Enforce, RuleAction::Allow), 3, None)
        .unwrap();
}
