//! Random clients against the server and against a reference model at once: every answer, every event and the whole tree must be the same.
//!
//! The model ([`reference`]) is a sorted map of paths that is copied where the store has snapshots, transactions that keep all their requests and
//! answers, and loops over everything where the store has an index.

#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../common/mod.rs"]
mod common;
mod reference;

use std::collections::BTreeSet;

use abi::xen::xenstore::op;
use common::Rig;
use proptest::prelude::*;
use reference::{Event, Model, NODES_MAX, PERMS_MAX, Request, SIZE_MAX};
use xenstore::{ClientId, Config, DomId, NoHost, Quota, Ring, Server};

/// What one of the clients does, or what happens to one of the domains.
#[derive(Debug, Clone)]
enum Step {
    Ask {
        client: usize,
        tx: u32,
        request: Request,
    },
    Start {
        client: usize,
    },
    End {
        client: usize,
        tx: u32,
        commit: bool,
    },
    Watch {
        client: usize,
        path: &'static str,
        token: &'static str,
        depth: Option<u32>,
    },
    Unwatch {
        client: usize,
        path: &'static str,
        token: &'static str,
    },
    Reset {
        client: usize,
    },
    /// The connection breaks, and another takes its place.
    Crash {
        client: usize,
    },
    /// The domain is released and introduced again.
    Die {
        domain: u16,
    },
    Target {
        domain: u16,
        target: u16,
    },
    /// Another process takes over.
    Restart,
}

const PATHS: [&str; 14] = [
    "/",
    "/a",
    "/a/b",
    "/a/b/c",
    "/a/d",
    "/open",
    "/open/x",
    "/open/x/y",
    "/local/domain/1",
    "/local/domain/1/x",
    "/local/domain/2/x/y",
    "x",
    "x/y",
    "x/z",
];
const WATCHED: [&str; 9] = ["/", "/a", "/a/b/c", "/open", "/open/x", "/local/domain/1/x", "x", "x/y", "@releaseDomain"];
const PERMS: [&str; 9] = ["n0", "r0", "b0", "n1", "b1", "n2\0r1", "n1\0b2", "n0\0b1\0r2", "r0\0n1\0b2\0w1"];
const VALUES: [&str; 4] = ["", "1", "2", "123456789"];
const TOKENS: [&str; 2] = ["s", "t"];

fn requests() -> impl Strategy<Value = Request> {
    let path = || prop::sample::select(&PATHS[..]);
    prop_oneof![
        3 => path().prop_map(Request::Read),
        2 => path().prop_map(Request::List),
        1 => path().prop_map(Request::GetPerms),
        6 => (path(), prop::sample::select(&VALUES[..])).prop_map(|(path, value)| Request::Write(path, value)),
        2 => path().prop_map(Request::Mkdir),
        3 => path().prop_map(Request::Remove),
        3 => (path(), prop::sample::select(&PERMS[..])).prop_map(|(path, perms)| Request::SetPerms(path, perms)),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let client = || 0usize..5;
    let tx = || prop_oneof![2 => Just(0u32), 3 => 1u32..4];
    let watched = || prop::sample::select(&WATCHED[..]);
    let token = || prop::sample::select(&TOKENS[..]);
    let depth = || prop_oneof![3 => Just(None), 1 => (0u32..3).prop_map(Some)];
    prop_oneof![
        24 => (client(), tx(), requests()).prop_map(|(client, tx, request)| Step::Ask { client, tx, request }),
        5 => client().prop_map(|client| Step::Start { client }),
        5 => (client(), 1u32..4, prop::bool::weighted(0.8)).prop_map(|(client, tx, commit)| Step::End { client, tx, commit }),
        3 => (client(), watched(), token(), depth()).prop_map(|(client, path, token, depth)| Step::Watch { client, path, token, depth }),
        1 => (client(), watched(), token()).prop_map(|(client, path, token)| Step::Unwatch { client, path, token }),
        1 => client().prop_map(|client| Step::Reset { client }),
        1 => client().prop_map(|client| Step::Crash { client }),
        1 => (1u16..4).prop_map(|domain| Step::Die { domain }),
        1 => (1u16..4, 1u16..4).prop_map(|(domain, target)| Step::Target { domain, target }),
        1 => Just(Step::Restart),
    ]
}

/// The server and the model, with the same clients: two of the host's and one of each of three domains.
struct Pair {
    rig: Rig,
    model: Model,
    clients: Vec<ClientId>,
}

const DOMAINS: [u16; 5] = [0, 0, 1, 2, 3];

impl Pair {
    fn new() -> Pair {
        let mut rig = Rig::new();
        for (quota, limit) in [(Quota::Nodes, NODES_MAX), (Quota::NodeSize, SIZE_MAX), (Quota::NodePermissions, PERMS_MAX)] {
            rig.server.store().set_quota(None, quota, u32::try_from(limit).unwrap());
        }
        let mut pair = Pair { rig, model: Model::new(&DOMAINS), clients: Vec::new() };
        for domain in DOMAINS {
            let client = pair.connect(domain);
            pair.clients.push(client);
        }
        for (path, perms) in [("/open", "b0"), ("/local/domain/1", "n1"), ("/local/domain/2", "n2\0r1"), ("/local/domain/3", "b3")] {
            pair.ask(0, 0, &Request::Mkdir(path));
            pair.ask(0, 0, &Request::SetPerms(path, perms));
        }
        pair
    }

    fn connect(&mut self, domain: u16) -> ClientId {
        match domain {
            0 => self.rig.socket(),
            _ => self.rig.server.introduce(DomId(domain), Ring { gfn: 1, port: 1 }).unwrap(),
        }
    }

    fn ask(&mut self, client: usize, tx: u32, request: &Request) {
        let (number, payload) = match request {
            Request::Read(path) => (op::READ, format!("{path}\0")),
            Request::List(path) => (op::DIRECTORY, format!("{path}\0")),
            Request::GetPerms(path) => (op::GET_PERMS, format!("{path}\0")),
            Request::Write(path, value) => (op::WRITE, format!("{path}\0{value}")),
            Request::Mkdir(path) => (op::MKDIR, format!("{path}\0")),
            Request::Remove(path) => (op::RM, format!("{path}\0")),
            Request::SetPerms(path, perms) => (op::SET_PERMS, format!("{path}\0{perms}\0")),
        };
        let answer = self.rig.call_bytes(self.clients[client], number, tx, payload.as_bytes());
        let expected = self.model.ask(client, tx, request);
        assert_eq!(answer, expected.map_err(str::to_owned), "{request:?} by {client} in {tx}");
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Ask { client, tx, request } => self.ask(*client, *tx, request),
            Step::Start { client } => {
                let answer = self.rig.call(self.clients[*client], op::TRANSACTION_START, 0, &["", ""]);
                assert_eq!(answer, self.model.start(*client).map_err(str::to_owned));
                // Who conflicts often gets to run alone, which is about time and not about results.
                self.rig.server.end_hold();
            }
            Step::End { client, tx, commit } => {
                let how = if *commit { "T" } else { "F" };
                let answer = self.rig.call(self.clients[*client], op::TRANSACTION_END, *tx, &[how, ""]);
                let expected = self.model.end(*client, *tx, *commit);
                assert_eq!(answer, expected.map(|()| b"OK\0".to_vec()).map_err(str::to_owned), "end of {tx} by {client}");
            }
            Step::Watch { client, path, token, depth } => {
                let depth_text = depth.map(|depth| format!("{depth}\0")).unwrap_or_default();
                let payload = format!("{path}\0{token}\0{depth_text}");
                let answer = self.rig.call_bytes(self.clients[*client], op::WATCH, 0, payload.as_bytes());
                let expected = self.model.watch(*client, path, token, *depth);
                assert_eq!(answer, expected.map(|()| b"OK\0".to_vec()).map_err(str::to_owned), "watch {path} {depth:?}");
            }
            Step::Unwatch { client, path, token } => {
                let answer = self.rig.call(self.clients[*client], op::UNWATCH, 0, &[path, token, ""]);
                let expected = self.model.unwatch(*client, path, token);
                assert_eq!(answer, expected.map(|()| b"OK\0".to_vec()).map_err(str::to_owned));
            }
            Step::Reset { client } => {
                self.rig.ok(self.clients[*client], op::RESET_WATCHES, 0, &["", ""]);
                self.model.reset(*client);
            }
            Step::Crash { client } => {
                let domain = DOMAINS[*client];
                if domain == 0 {
                    self.rig.server.disconnect(self.clients[*client]);
                    self.clients[*client] = self.connect(0);
                } else {
                    self.rig.server.reconnect(self.clients[*client]);
                }
                self.model.crash(*client, domain == 0);
            }
            Step::Die { domain } => {
                self.rig.ok(self.clients[0], op::RELEASE, 0, &[&domain.to_string(), ""]);
                self.model.die(*domain);
                let client = DOMAINS.iter().position(|other| other == domain).unwrap();
                self.clients[client] = self.connect(*domain);
            }
            Step::Target { domain, target } => {
                self.rig.ok(self.clients[0], op::SET_TARGET, 0, &[&domain.to_string(), &target.to_string(), ""]);
                self.model.set_target(*domain, *target);
            }
            Step::Restart => {
                self.rig.server = Server::restored(self.rig.server.state(), Config::default(), Box::new(NoHost)).unwrap();
                self.model.restart();
            }
        }
        self.compare(step);
    }

    /// Events and the tree. Equal events of one step are one, as they wait together.
    fn compare(&mut self, step: &Step) {
        for client in self.clients.clone() {
            assert_eq!(self.rig.replies(client), []);
        }
        let number = |client| self.clients.iter().position(|other| *other == client);
        let heard = std::mem::take(&mut self.rig.events);
        let heard: BTreeSet<Event> = heard.into_iter().filter_map(|(client, path, token)| Some((number(client)?, path, token))).collect();
        let expected: BTreeSet<Event> = self.model.take_events().into_iter().collect();
        assert_eq!(heard, expected, "events of {step:?}");
        let tree: Vec<_> =
            self.rig.server.state().nodes.into_iter().map(|node| (node.path, node.value.as_bytes().to_vec(), node.perms)).collect();
        assert_eq!(tree, self.model.tree(), "tree after {step:?}");
        assert!(self.rig.server.store().is_consistent(), "accounts after {step:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn server_does_what_the_model_does(steps in prop::collection::vec(steps(), 1..120)) {
        let mut pair = Pair::new();
        steps.iter().for_each(|step| pair.step(step));
    }
}
