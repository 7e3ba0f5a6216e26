//! Whether the agent is ready, and if not, what is missing.
//!
//! Enters: named conditions, each set by the part that knows ([`Readiness::condition`]). Leaves: 200 or 503 at `/healthz/ready`,
//! with a text that names every condition that is not met. With no condition at all the agent is not ready: it has hardly begun.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;

/// All conditions. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Vec<State>>>);

#[derive(Debug)]
struct State {
    name: &'static str,
    /// Why it is not met; none when it is.
    missing: Option<Cow<'static, str>>,
}

/// One condition. It stays as it was last set when this is dropped.
#[derive(Debug)]
pub struct Condition {
    all: Readiness,
    index: usize,
}

impl Readiness {
    /// No conditions yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition, which is not met until it is set. Conditions are for the life of the process: one a part, not one a pod.
    #[must_use]
    pub fn condition(&self, name: &'static str) -> Condition {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        states.push(State { name, missing: Some("not yet".into()) });
        Condition { all: self.clone(), index: states.len() - 1 }
    }

    /// Whether there are conditions and all of them are met.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.missing().is_empty()
    }

    /// What is missing: a line for each condition that is not met, `<name>: <why>`.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if states.is_empty() {
            return vec!["agent: starting".to_owned()];
        }
        states.iter().filter_map(|state| state.missing.as_ref().map(|why| format!("{}: {why}", state.name))).collect()
    }
}

impl Condition {
    /// The condition is met.
    pub fn met(&self) {
        self.set(None);
    }

    /// The condition is not met, and why, in words for an operator.
    pub fn missing(&self, why: impl Into<Cow<'static, str>>) {
        self.set(Some(why.into()));
    }

    fn set(&self, missing: Option<Cow<'static, str>>) {
        let mut states = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = states.get_mut(self.index) {
            state.missing = missing;
        }
    }
}

/// The routes of the readiness server.
pub fn router(readiness: Readiness) -> Router {
    Router::new().route("/healthz/ready", get(async move || answer(&readiness)))
}

fn answer(readiness: &Readiness) -> (StatusCode, String) {
    let missing = readiness.missing();
    if missing.is_empty() {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let mut text = String::from("not ready\n");
    for line in missing {
        writeln!(text, "{line}").unwrap_or_default();
    }
    (StatusCode::SERVICE_UNAVAILABLE, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_without_conditions_is_not_ready() {
        assert_eq!(answer(&Readiness::new()), (StatusCode::SERVICE_UNAVAILABLE, "not ready\nagent: starting\n".into()));
    }

    #[test]
    fn the_answer_names_what_is_missing_and_only_that() {
        let readiness = Readiness::new();
        let (programs, controller) = (readiness.condition("programs"), readiness.condition("controller"));
        programs.met();
        assert_eq!(answer(&readiness), (StatusCode::SERVICE_UNAVAILABLE, "not ready\ncontroller: not yet\n".into()));
        controller.missing("https://10.0.0.1:15012 refused the connection");
        assert!(answer(&readiness).1.contains("controller: https://10.0.0.1:15012 refused"));
        controller.met();
        assert_eq!(answer(&readiness), (StatusCode::OK, "ready\n".into()));
    }

    #[test]
    fn a_condition_that_was_met_can_be_lost_again() {
        let readiness = Readiness::new();
        let condition = readiness.condition("drain");
        condition.met();
        assert!(readiness.is_ready());
        condition.missing("the agent is stopping");
        assert!(!readiness.is_ready());
    }

    #[test]
    fn a_dropped_handle_leaves_its_condition_as_it_was() {
        let readiness = Readiness::new();
        drop(readiness.condition("programs"));
        assert_eq!(readiness.missing(), ["programs: not yet"]);
    }
}
