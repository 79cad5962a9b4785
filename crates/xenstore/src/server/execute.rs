//! One request: checked, done, answered.

use std::sync::Arc;

use abi::xen::xenstore::{Header, NO_TRANSACTION, OK, PAYLOAD_MAX};

use super::output::Unsure;
use super::{Answer, CONFLICTS_BEFORE_HOLD, Server, control, note_held};
use crate::bytes::Value;
use crate::domid::DomId;
use crate::edit::{Names, Op};
use crate::error::Error;
use crate::path::{Path, Special};
use crate::perms::Perms;
use crate::quota::Quota;
use crate::store::{ClientId, TxId};
use crate::watch::Event;
use crate::wire::{Request, ignores_transaction, is_privileged};

/// What a request is answered with.
pub(super) enum Reply {
    /// `OK`.
    Done,
    /// A value.
    Value(Value),
    /// Names, each with its zero byte.
    Names(Names),
    /// Names from an offset on, after their generation.
    Part(Names, usize),
    /// Permissions.
    Perms(Arc<Perms>),
    /// A text, to be followed by a zero byte.
    Text(String),
    /// `OK`, and then an event.
    Watching(Event),
    /// `OK` as a text, unless no process takes over.
    OnceTakenOver,
}

impl Reply {
    fn write(&self, to: &mut Vec<u8>) -> Result<(), Error> {
        match self {
            Reply::Done | Reply::Watching(_) => to.extend_from_slice(OK),
            Reply::Value(value) => fits(value.len()).map(|()| to.extend_from_slice(value.as_bytes()))?,
            Reply::Names(names) => {
                fits(names.listed_bytes())?;
                names.iter().for_each(|name| push_string(to, name));
            }
            Reply::Part(names, offset) => write_part(to, names, *offset),
            Reply::Perms(perms) => {
                let before = to.len();
                perms.entries().for_each(|entry| push_string(to, entry.to_string().as_bytes()));
                fits(to.len() - before)?;
            }
            Reply::Text(text) => fits(text.len() + 1).map(|()| push_string(to, text.as_bytes()))?,
            Reply::OnceTakenOver => push_string(to, b"OK"),
        }
        Ok(())
    }
}

fn fits(length: usize) -> Result<(), Error> {
    if length > PAYLOAD_MAX { Err(Error::TooLong) } else { Ok(()) }
}

fn push_string(to: &mut Vec<u8>, text: &[u8]) {
    to.extend_from_slice(text);
    to.push(0);
}

/// The generation, then whole names as far as they fit; an empty name marks the end of the list. `offset` counts the bytes of the whole list.
fn write_part(to: &mut Vec<u8>, names: &Names, offset: usize) {
    let before = to.len();
    push_string(to, names.generation().to_string().as_bytes());
    let mut end = 0;
    for name in names.iter() {
        let begin = end;
        end += name.len() + 1;
        let Some(tail) = name.get(offset.saturating_sub(begin)..) else { continue };
        // One byte stays free for the mark.
        if to.len() - before + tail.len() + 1 >= PAYLOAD_MAX {
            return;
        }
        push_string(to, tail);
    }
    to.push(0);
}

impl Server {
    /// Does a request and queues what it is answered with, after the events that it caused.
    pub(super) fn answer(&mut self, client: ClientId, header: &Header, payload: &[u8]) {
        let before = self.store.changes();
        let result = self.execute(client, header, payload);
        self.deliver();
        let (changes, holds_back) = (self.store.changes() != before, self.store.holds_back());
        if let Some(connection) = self.connections.get_mut(&client) {
            if holds_back {
                connection.output.hold();
                note_held(&mut self.held, client);
            }
            match result {
                Ok(Reply::OnceTakenOver) => connection.output.doubt(Unsure::TakenOver),
                Ok(_) if changes && holds_back => connection.output.doubt(Unsure::Kept),
                _ => {}
            }
            connection.output.reply(header, |to| result.as_ref().map_err(|error| *error).and_then(|reply| reply.write(to)));
            if let Ok(Reply::Watching(event)) = &result {
                connection.output.event(event);
            }
        }
        self.activate(client);
    }

    fn execute(&mut self, client: ClientId, header: &Header, payload: &[u8]) -> Result<Reply, Error> {
        let (operation, tx) = (header.op.get(), header.tx_id.get());
        let request = Request::parse(operation, payload);
        if request == Err(Error::NoOperation) {
            return Err(Error::NoOperation);
        }
        let privileged = self.store.caller(client)?.privileged;
        if is_privileged(operation) && !privileged {
            return Err(Error::NotPrivileged);
        }
        if tx != NO_TRANSACTION && !ignores_transaction(operation) && !self.store.has_transaction(client, tx) {
            return Err(Error::NoTransaction);
        }
        match request? {
            Request::Read(path) => self.node(client, path).and_then(|path| self.store.read(client, tx, &path)).map(Reply::Value),
            Request::Directory(path) => self.node(client, path).and_then(|path| self.store.list(client, tx, &path)).map(Reply::Names),
            Request::DirectoryPart(path, offset) => {
                let names = self.node(client, path).and_then(|path| self.store.list(client, tx, &path))?;
                Ok(Reply::Part(names, offset))
            }
            Request::Write(path, value) => {
                let path = self.node(client, path)?;
                self.change(client, tx, Op::Write(path, value.into()))
            }
            Request::Mkdir(path) => self.node(client, path).and_then(|path| self.change(client, tx, Op::Mkdir(path))),
            Request::Remove(path) => self.node(client, path).and_then(|path| self.change(client, tx, Op::Remove(path))),
            Request::GetPerms(path) => match Special::of(path) {
                Some(special) => self.store.special_perms(client, special),
                None => self.node(client, path).and_then(|path| self.store.perms(client, tx, &path)),
            }
            .map(Reply::Perms),
            Request::SetPerms(path, perms) => match Special::of(path) {
                Some(special) => self.store.set_special_perms(client, special, perms).map(|()| Reply::Done),
                None => self.node(client, path).and_then(|path| self.change(client, tx, Op::SetPerms(path, Arc::new(perms)))),
            },
            Request::Watch(path, token, depth) => {
                let watched = self.store.watched(client, path)?;
                self.store.watch(client, &watched, token, depth).map(Reply::Watching)
            }
            Request::Unwatch(path, token) => {
                let watched = self.store.watched(client, path)?;
                self.store.unwatch(client, &watched, token).map(|()| Reply::Done)
            }
            Request::ResetWatches => {
                self.store.reset(client);
                self.end_hold_of(client);
                Ok(Reply::Done)
            }
            Request::TransactionStart => self.start(client, tx),
            Request::TransactionEnd(commit) => self.end(client, tx, commit),
            Request::GetDomainPath(domain) => Ok(Reply::Text(Path::home(domain).to_string())),
            Request::GetFeature(Some(_)) if !privileged => Err(Error::NotPrivileged),
            request => self.manage(client, request),
        }
    }

    /// Requests about domains and the server itself.
    fn manage(&mut self, client: ClientId, request: Request) -> Result<Reply, Error> {
        match request {
            Request::Introduce(domain, ring) => self.introduce(domain, ring).map(|_| Reply::Done),
            Request::Release(domain) => {
                let closed = self.store.release(domain)?;
                self.closed(domain, &closed);
                Ok(Reply::Done)
            }
            Request::IsDomainIntroduced(domain) => {
                let introduced = domain == DomId::SELF || self.store.is_introduced(domain);
                Ok(Reply::Text(if introduced { "T" } else { "F" }.into()))
            }
            Request::Resume(domain) => self.store.resume(domain).map(|()| Reply::Done),
            Request::SetTarget(domain, target) => self.store.set_target(domain, target).map(|()| Reply::Done),
            Request::GetFeature(domain) => {
                let domain = self.existing(domain)?.map_or_else(|| self.store.caller(client).map(|caller| caller.domain), Ok)?;
                Ok(Reply::Text(self.store.features(domain).to_string()))
            }
            Request::SetFeature(domain, features) => {
                self.existing(Some(domain))?;
                self.store.set_features(domain, features).map(|()| Reply::Done)
            }
            Request::GetQuota(_, None) => Ok(Reply::Text(Quota::ALL.map(Quota::name).join(" "))),
            Request::GetQuota(domain, Some(quota)) => {
                let domain = self.existing(domain)?;
                Ok(Reply::Text(self.store.quotas(domain).get(quota).to_string()))
            }
            Request::SetQuota(domain, quota, limit) => {
                let domain = self.existing(domain)?;
                self.store.set_quota(domain, quota, limit);
                Ok(Reply::Done)
            }
            Request::Control(arguments) => match control::control(&mut self.store, self.host.as_mut(), &arguments)? {
                Answer::Now(text) => Ok(Reply::Text(text)),
                Answer::OnceTakenOver => Ok(Reply::OnceTakenOver),
            },
            _ => Err(Error::NoOperation),
        }
    }

    fn node(&self, client: ClientId, path: &[u8]) -> Result<Path, Error> {
        self.store.path(client, path)
    }

    fn change(&mut self, client: ClientId, tx: TxId, op: Op) -> Result<Reply, Error> {
        self.store.apply(client, tx, op).map(|()| Reply::Done)
    }

    fn start(&mut self, client: ClientId, tx: TxId) -> Result<Reply, Error> {
        if tx != NO_TRANSACTION {
            return Err(Error::Nested);
        }
        let id = self.store.begin(client)?;
        let starving = self.connections.get(&client).is_some_and(|connection| connection.conflicts >= CONFLICTS_BEFORE_HOLD);
        if starving && self.hold.is_none() {
            self.hold = Some(client);
            tracing::info!(client = client.0, "domains wait for a transaction that conflicted too often");
        }
        Ok(Reply::Text(id.to_string()))
    }

    fn end(&mut self, client: ClientId, tx: TxId, commit: bool) -> Result<Reply, Error> {
        let result = if commit { self.store.commit(client, tx) } else { self.store.abort(client, tx) };
        if let Some(connection) = self.connections.get_mut(&client).filter(|connection| connection.privileged) {
            match result {
                Err(Error::Conflict) => connection.conflicts += 1,
                Ok(()) if commit => connection.conflicts = 0,
                _ => {}
            }
        }
        self.deliver();
        self.end_hold_of(client);
        result.map(|()| Reply::Done)
    }

    fn existing(&self, domain: Option<DomId>) -> Result<Option<DomId>, Error> {
        match domain {
            Some(domain) if domain != DomId::HOST && !self.host.exists(domain) => Err(Error::NoDomain),
            domain => Ok(domain),
        }
    }
}
