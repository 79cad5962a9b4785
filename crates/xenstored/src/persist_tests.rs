//! The file against the tree: after every way to stop, the file has what was committed, and nothing by halves.

use std::io;
use std::sync::{Mutex, MutexGuard};

use xenstore::{ClientId, Config, NoHost, NodeState};

use super::*;

/// A disk that loses power: after some operations everything fails, and of what was written since the last sync anything may be there.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    durable: Vec<u8>,
    now: Vec<u8>,
    since: Vec<(usize, Vec<u8>)>,
    /// Operations until power is lost.
    left: usize,
}

impl Disk {
    fn new(durable: Vec<u8>, left: usize) -> Disk {
        Disk(Arc::new(Mutex::new(Contents { now: durable.clone(), durable, since: Vec::new(), left })))
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap()
    }

    fn work(&self) -> io::Result<MutexGuard<'_, Contents>> {
        let mut contents = self.contents();
        contents.left = contents.left.checked_sub(1).ok_or_else(|| io::Error::other("no power"))?;
        Ok(contents)
    }

    /// What may be found afterwards: nothing, all, every other, or a part of the last of what was not synced.
    fn survivors(&self) -> Vec<Vec<u8>> {
        let contents = self.contents();
        let with = |writes: &mut dyn Iterator<Item = (usize, &[u8])>| {
            let mut bytes = contents.durable.clone();
            for (offset, data) in writes {
                bytes.resize(bytes.len().max(offset + data.len()), 0);
                bytes[offset..offset + data.len()].copy_from_slice(data);
            }
            bytes
        };
        let since = || contents.since.iter().map(|(offset, data)| (*offset, data.as_slice()));
        let last = contents.since.len().saturating_sub(1);
        vec![
            with(&mut std::iter::empty()),
            with(&mut since()),
            with(&mut since().step_by(2)),
            with(&mut since().skip(1).step_by(2)),
            with(&mut since().enumerate().map(|(at, (offset, data))| (offset, if at == last { &data[..data.len() / 2] } else { data }))),
        ]
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.contents().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let contents = self.contents();
        let from = contents.now.get(offset as usize..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut contents = self.work()?;
        contents.now.resize(length as usize, 0);
        contents.durable.resize(length as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut contents = self.work()?;
        contents.durable = contents.now.clone();
        contents.since.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut contents = self.work()?;
        let offset = offset as usize;
        contents.now[offset..offset + data.len()].copy_from_slice(data);
        contents.since.push((offset, data.into()));
        Ok(())
    }
}

/// A server with a client of the host's.
struct Rig {
    server: Server,
    host: ClientId,
}

impl Rig {
    fn new(persistence: &Persistence) -> Rig {
        Rig::try_new(persistence).unwrap()
    }

    fn try_new(persistence: &Persistence) -> Result<Rig, PersistError> {
        let mut server = Server::new(Store::new(Config { journal: true, ..Config::default() }), Box::new(NoHost));
        persistence.restore(&mut server)?;
        let host = server.store().open(DomId::HOST, true);
        Ok(Rig { server, host })
    }

    fn write(&mut self, tx: u32, path: &str, value: &str) {
        self.apply(tx, Op::Write(at(path), value.as_bytes().into()));
    }

    fn apply(&mut self, tx: u32, op: Op) {
        self.server.store().apply(self.host, tx, op).unwrap();
    }

    fn nodes(&self) -> Vec<NodeState> {
        self.server.state().nodes
    }

    fn paths(&self) -> Vec<String> {
        self.nodes().into_iter().map(|node| node.path).collect()
    }

    /// One of the things that clients do, each of which is acknowledged on its own.
    fn step(&mut self, number: usize) {
        match number % 4 {
            0 => self.write(0, &format!("/keys/{number}/value"), &"x".repeat(number * 40)),
            1 => {
                let tx = self.server.store().begin(self.host).unwrap();
                self.apply(tx, Op::Remove(at("/pair")));
                self.write(tx, "/pair/one", &number.to_string());
                self.write(tx, "/pair/two", &number.to_string());
                self.server.store().commit(self.host, tx).unwrap();
            }
            2 => {
                let perms = Perms::parse(["n0", &format!("r{number}")].into_iter().map(str::as_bytes)).unwrap();
                self.apply(0, Op::SetPerms(at("/pair/one"), Arc::new(perms)));
            }
            _ => self.apply(0, Op::Remove(at(&format!("/keys/{}", number - 3)))),
        }
    }
}

fn at(path: &str) -> Path {
    Path::parse(path.as_bytes(), DomId::HOST, 0).unwrap()
}

const STEPS: usize = 12;

/// Rights of guests are dropped by a restoration, so they are no part of the comparison.
fn without_guests(nodes: Vec<NodeState>) -> Vec<NodeState> {
    let host = Perms::private(DomId::HOST);
    nodes.into_iter().map(|node| NodeState { perms: host.clone(), ..node }).collect()
}

#[test]
fn after_a_loss_of_power_at_any_write_every_acknowledged_change_is_there_and_no_half_one() {
    // What the tree is after each number of steps.
    let mut rig = Rig::new(&Persistence::on(Disk::new(Vec::new(), usize::MAX)).unwrap());
    let mut history = vec![rig.nodes()];
    for number in 0..STEPS {
        rig.step(number);
        history.push(without_guests(rig.nodes()));
    }
    let empty = Disk::new(Vec::new(), usize::MAX);
    drop(Persistence::on(empty.clone()).unwrap());
    let empty = empty.contents().durable.clone();
    let mut power = 0;
    loop {
        let disk = Disk::new(empty.clone(), power);
        let mut acknowledged = 0;
        if let Ok(persistence) = Persistence::on(disk.clone()) {
            let mut rig = Rig::try_new(&persistence).ok();
            while let Some(rig) = rig.as_mut().filter(|_| acknowledged < STEPS) {
                rig.step(acknowledged);
                if persistence.commit(rig.server.store()).is_err() {
                    break;
                }
                acknowledged += 1;
            }
        }
        let all = acknowledged == STEPS;
        for (way, survivor) in disk.survivors().into_iter().enumerate() {
            let persistence = Persistence::on(Disk::new(survivor, usize::MAX)).unwrap_or_else(|error| panic!("{power} {way}: {error}"));
            let found = without_guests(Rig::new(&persistence).nodes());
            let allowed = &history[acknowledged..history.len().min(acknowledged + 2)];
            assert!(allowed.contains(&found), "{power} operations, way {way}, {acknowledged} acknowledged: {found:?}");
        }
        if all {
            break;
        }
        power += 1;
    }
    assert!(power > 50, "the disk lost power {power} times only");
}

#[test]
fn what_describes_running_domains_is_not_kept() {
    let disk = Disk::new(Vec::new(), usize::MAX);
    let persistence = Persistence::on(disk.clone()).unwrap();
    let mut rig = Rig::new(&persistence);
    for path in ["/local/domain/3/data", "/vm/uuid/name", "/libxl/3", "/local/pool/name", "/tool/a", "/vmx"] {
        rig.write(0, path, "value");
    }
    persistence.commit(rig.server.store()).unwrap();
    drop(persistence);
    let rig = Rig::new(&Persistence::on(disk).unwrap());
    assert_eq!(rig.paths(), ["/", "/local", "/local/pool", "/local/pool/name", "/tool", "/tool/a", "/vmx"]);
}

#[test]
fn next_domain_of_a_number_inherits_nothing_from_the_file() {
    let disk = Disk::new(Vec::new(), usize::MAX);
    let persistence = Persistence::on(disk.clone()).unwrap();
    let mut rig = Rig::new(&persistence);
    rig.write(0, "/owned/below", "value");
    rig.write(0, "/shared", "value");
    let perms = |entries: [&str; 2]| Arc::new(Perms::parse(entries.into_iter().map(str::as_bytes)).unwrap());
    rig.apply(0, Op::SetPerms(at("/owned"), perms(["n3", "r4"])));
    rig.apply(0, Op::SetPerms(at("/shared"), perms(["n0", "b3"])));
    persistence.commit(rig.server.store()).unwrap();
    drop((rig, persistence));
    for _ in 0..2 {
        let rig = Rig::new(&Persistence::on(disk.clone()).unwrap());
        assert_eq!(rig.paths(), ["/", "/shared"]);
        assert_eq!(rig.nodes()[1].perms, Perms::private(DomId::HOST));
    }
}

#[test]
fn other_files_are_refused_and_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "text, and nothing else").unwrap();
    assert!(matches!(Persistence::open(&path), Err(PersistError::Database(_))));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "text, and nothing else");
}
