//! Addresses that somebody asks about, until the controller has answered.
//!
//! Enters: questions, answers, the time. Leaves: the names to subscribe to and, once answered or too old, to unsubscribe from.
//! Questions on one address are asked once, but an answer counts for those only that were put before it: who was nobody a moment ago
//! may be a pod now. Everything is bounded: the addresses asked about, and the questions on each.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{OUTSTANDING, Question, RESOLVE_DEADLINE, Reply, ResolveError};
use crate::model::Snapshot;

/// The most questions on one address.
const MERGED: usize = 4096;

/// The open questions.
#[derive(Debug, Default)]
pub(super) struct Questions {
    open: HashMap<IpAddr, Open>,
    deadlines: VecDeque<(Instant, IpAddr)>,
}

#[derive(Debug)]
struct Open {
    deadline: Instant,
    replies: Vec<oneshot::Sender<Reply>>,
}

impl Questions {
    /// Notes a question. Gives the name to subscribe to, if the controller must be asked: what is known, or being asked, is not.
    pub(super) fn ask(&mut self, question: Question, snapshot: &Arc<Snapshot>, now: Instant) -> Option<String> {
        let Question { address, reply } = question;
        if snapshot.workload_at(address).is_some() || snapshot.service_at(address).is_some() {
            send(reply, Ok(Arc::clone(snapshot)));
            return None;
        }
        if let Some(open) = self.open.get_mut(&address) {
            open.replies.retain(|reply| !reply.is_closed());
            match open.replies.len() {
                0..MERGED => open.replies.push(reply),
                _ => send(reply, Err(ResolveError::Overloaded)),
            }
            return None;
        }
        if self.open.len() >= OUTSTANDING {
            send(reply, Err(ResolveError::Overloaded));
            return None;
        }
        let deadline = now + RESOLVE_DEADLINE;
        self.open.insert(address, Open { deadline, replies: vec![reply] });
        self.deadlines.push_back((deadline, address));
        Some(name_of(address))
    }

    /// Whether somebody asks about `address`.
    pub(super) fn is_open(&self, address: IpAddr) -> bool {
        self.open.contains_key(&address)
    }

    /// Replies to the questions on these addresses with the state that holds the answer. Gives the names to unsubscribe from.
    pub(super) fn answer(&mut self, addresses: &[IpAddr], snapshot: &Arc<Snapshot>) -> Vec<String> {
        let mut names = Vec::new();
        for address in addresses {
            let Some(open) = self.open.remove(address) else { continue };
            for reply in open.replies {
                send(reply, Ok(Arc::clone(snapshot)));
            }
            names.push(name_of(*address));
        }
        names
    }

    /// Gives up the questions whose time is over. Gives the names to unsubscribe from.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<String> {
        let mut names = Vec::new();
        while let Some((_, address)) = self.deadlines.pop_front_if(|(deadline, _)| *deadline <= now) {
            // An address that was answered and asked about again has a later deadline of its own.
            if self.open.get(&address).is_some_and(|open| open.deadline <= now) {
                self.open.remove(&address).into_iter().flat_map(|open| open.replies).for_each(|reply| {
                    send(reply, Err(ResolveError::Timeout));
                });
                names.push(name_of(address));
            }
        }
        names
    }

    /// When [`Self::expire`] next has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.front().map(|(deadline, _)| *deadline)
    }

    /// Gives up all questions: the controller is gone.
    pub(super) fn abandon(&mut self) {
        let Self { open, .. } = std::mem::take(self);
        open.into_values().flat_map(|open| open.replies).for_each(|reply| send(reply, Err(ResolveError::NotConnected)));
    }
}

/// The name of the resource at `address`: `network/address`, with the mesh's one network, which has no name.
fn name_of(address: IpAddr) -> String {
    format!("/{address}")
}

/// The address in a name of [`name_of`]'s form.
pub(super) fn address_in(name: &str) -> Option<IpAddr> {
    let (_network, address) = name.split_once('/')?;
    address.parse().ok()
}

fn send(reply: oneshot::Sender<Reply>, answer: Reply) {
    // Whoever asked may have gone.
    let _gone = reply.send(answer);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_on_one_address_are_asked_once_and_answered_together() {
        let (mut questions, snapshot, now) = (Questions::default(), snapshot(), Instant::now());
        let (one, mut first) = question("10.0.0.9");
        let (other, mut second) = question("10.0.0.9");
        assert_eq!(questions.ask(one, &snapshot, now).as_deref(), Some("/10.0.0.9"));
        assert_eq!(questions.ask(other, &snapshot, now), None);
        assert_eq!(questions.answer(&[ip("10.0.0.9")], &snapshot), ["/10.0.0.9"]);
        assert!(first.try_recv().expect("answered").is_ok() && second.try_recv().expect("answered").is_ok());
    }

    #[test]
    fn an_answer_counts_for_no_later_question() {
        let (mut questions, snapshot, now) = (Questions::default(), snapshot(), Instant::now());
        for _ in 0..2 {
            let (question, _reply) = question("fd00::9");
            assert!(questions.ask(question, &snapshot, now).is_some());
            assert_eq!(questions.answer(&[ip("fd00::9")], &snapshot), ["/fd00::9"]);
        }
    }

    #[test]
    fn a_question_that_is_not_answered_in_time_is_given_up_and_unsubscribed() {
        let (mut questions, snapshot, now) = (Questions::default(), snapshot(), Instant::now());
        let (question, mut reply) = question("10.0.0.9");
        questions.ask(question, &snapshot, now);
        assert!(questions.expire(now + RESOLVE_DEADLINE / 2).is_empty());
        assert_eq!(questions.next_deadline(), Some(now + RESOLVE_DEADLINE));
        assert_eq!(questions.expire(now + RESOLVE_DEADLINE), ["/10.0.0.9"]);
        assert_eq!(reply.try_recv().expect("told").expect_err("in vain"), ResolveError::Timeout);
        assert_eq!(questions.next_deadline(), None);
    }

    #[test]
    fn more_addresses_than_the_bound_are_turned_away() {
        let (mut questions, snapshot, now) = (Questions::default(), snapshot(), Instant::now());
        for number in 0..OUTSTANDING {
            let (question, _reply) = question(&format!("10.0.{}.{}", number / 256, number % 256));
            assert!(questions.ask(question, &snapshot, now).is_some());
        }
        let (question, mut reply) = question("10.9.9.9");
        assert!(questions.ask(question, &snapshot, now).is_none());
        assert_eq!(reply.try_recv().expect("told").expect_err("turned away"), ResolveError::Overloaded);
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn snapshot() -> Arc<Snapshot> {
        Arc::new(Snapshot::empty("node"))
    }

    fn question(address: &str) -> (Question, oneshot::Receiver<Reply>) {
        let (reply, answer) = oneshot::channel();
        (Question { address: ip(address), reply }, answer)
    }
}
