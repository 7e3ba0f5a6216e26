//! Tells those who write policies which part of one is not enforced, and why: as Events on the policy, and as a condition in its
//! status where its definition has one.
//!
//! Enters: [`Finding`]s. Leaves: for each problem one Event, whose name only the policy and the problem decide, said again while it
//! holds since the API server forgets Events after an hour; and the condition `culvert.dev/Enforced`, False with the problems or,
//! once they are gone, True. A policy that never had a problem is not written to.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Now;
use super::api::{self, ApiError};
use super::resource::Offered;
use super::rotation::written;
use crate::backoff::Backoff;
use crate::controller::index::Finding;
use crate::controller::source::ObjectKey;
use crate::controller::source::kubernetes::resource;

/// The type of the condition.
pub const CONDITION: &str = "culvert.dev/Enforced";
/// The reason of the Events, and of the condition when it is false.
pub const REASON: &str = "NotEnforced";
/// Events of one policy at once.
const MOST_EVENTS: usize = 10;
/// The longest message of an Event, in bytes (Kubernetes API, `events.k8s.io`).
const LONGEST: usize = 1024;
/// How often Events are said again.
const SAY_AGAIN: Duration = Duration::from_secs(30 * 60);
/// The first and the longest wait after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Starts telling, until `stop` is cancelled. Findings are put together by policy: what is sent takes no more room than there are
/// policies.
#[must_use]
pub fn start(client: Client, now: Now, stop: CancellationToken) -> mpsc::UnboundedSender<Finding> {
    let (findings, receiver) = mpsc::unbounded_channel();
    let reporter = Reporter { client, now, problems: BTreeMap::new(), pending: BTreeMap::new() };
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = reporter.run(receiver) => {}
        }
    });
    findings
}

struct Reporter {
    client: Client,
    now: Now,
    /// The policies with problems.
    problems: BTreeMap<ObjectKey, Finding>,
    /// What is to be told.
    pending: BTreeMap<ObjectKey, Finding>,
}

impl Reporter {
    async fn run(mut self, mut findings: mpsc::UnboundedReceiver<Finding>) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut again = Instant::now() + SAY_AGAIN;
        let mut retry_at = Instant::now();
        loop {
            tokio::select! {
                biased;
                finding = findings.recv() => match finding {
                    Some(finding) => self.take(finding),
                    None => return,
                },
                () = sleep_until(retry_at), if !self.pending.is_empty() => match self.tell_one().await {
                    Ok(()) => backoff.reset(),
                    Err(error) => {
                        warn!("what a policy does not enforce cannot be told: {error}");
                        retry_at = Instant::now() + backoff.next_wait();
                    }
                },
                () = sleep_until(again) => {
                    again = Instant::now() + SAY_AGAIN;
                    self.pending.extend(self.problems.clone());
                }
            }
        }
    }

    fn take(&mut self, finding: Finding) {
        match &finding.problems {
            Some(problems) if !problems.is_empty() => drop(self.problems.insert(finding.policy.clone(), finding.clone())),
            Some(_) | None => drop(self.problems.remove(&finding.policy)),
        }
        if finding.problems.is_some() {
            self.pending.insert(finding.policy.clone(), finding);
        } else {
            self.pending.remove(&finding.policy);
        }
    }

    /// Tells what is to be said of one policy. On an error it stays to be told.
    async fn tell_one(&mut self) -> Result<(), ApiError> {
        let Some(finding) = self.pending.values().next().cloned() else { return Ok(()) };
        let problems = finding.problems.as_deref().unwrap_or_default();
        let offered = resource(finding.policy.kind).offered(&self.client).await?;
        if let Some(offered) = offered {
            for problem in problems.iter().take(MOST_EVENTS) {
                self.tell_event(&finding, offered, problem).await?;
            }
            if offered.status {
                self.tell_status(&finding, offered, problems).await?;
            }
        }
        self.pending.remove(&finding.policy);
        Ok(())
    }

    async fn tell_event(&self, finding: &Finding, offered: Offered, problem: &str) -> Result<(), ApiError> {
        let ObjectKey { kind, namespace, name } = &finding.policy;
        let event_name = format!("{name}.{}", event_suffix(finding, problem));
        let path = format!("/api/v1/namespaces/{namespace}/events/{event_name}");
        let at = written((self.now)());
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": event_name, "namespace": namespace },
            "involvedObject": {
                "apiVersion": offered.api_version(),
                "kind": kind.as_str(),
                "namespace": namespace,
                "name": name,
                "uid": finding.uid,
            },
            "type": "Warning",
            "reason": REASON,
            "message": shortened(problem),
            "source": { "component": api::FIELD_MANAGER },
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        });
        match api::apply(&self.client, &path, &event).await {
            // A namespace that is being removed takes no Events.
            Err(error) if error.is_absent() || error.code() == Some(403) => {
                debug!(%error, policy = %finding.policy, "an Event was not taken");
                Ok(())
            }
            told => told,
        }
    }

    /// Writes the condition, unless it is there already, or would say of a policy what nobody ever doubted.
    async fn tell_status(&self, finding: &Finding, offered: Offered, problems: &[String]) -> Result<(), ApiError> {
        let ObjectKey { namespace, name, .. } = &finding.policy;
        let path = format!("{}/{name}", offered.collection(Some(namespace)));
        let mut policy: Value = match api::get(&self.client, &path).await {
            Err(error) if error.is_absent() => return Ok(()),
            policy => policy?,
        };
        let of_another = finding.uid.as_deref() != policy.pointer("/metadata/uid").and_then(Value::as_str);
        if of_another || !set_condition(&mut policy, problems, finding.generation, (self.now)()) {
            return Ok(());
        }
        let written: Result<Value, ApiError> = api::replace(&self.client, &format!("{path}/status"), &policy).await;
        match written {
            // Another replica was quicker, or the policy has changed: either tells us so.
            Err(error) if error.is_absent() || error.is_conflict() => Ok(()),
            written => written.map(drop),
        }
    }
}

/// Puts the condition into a policy. Gives whether that changed anything.
fn set_condition(policy: &mut Value, problems: &[String], generation: Option<i64>, now: SystemTime) -> bool {
    let conditions = policy.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let (mut own, mut all): (Vec<_>, Vec<_>) = conditions.into_iter().partition(|condition| condition["type"] == CONDITION);
    let before = own.pop();
    let (status, reason, message) = match problems {
        [] if before.is_none() => return false,
        [] => ("True", "Enforced", String::new()),
        _ => ("False", REASON, problems.join("\n")),
    };
    let same = |field: &str, value: &str| before.as_ref().is_some_and(|before| before[field] == value);
    if same("status", status) && same("message", &message) && same("reason", reason) {
        return false;
    }
    let since = before.as_ref().filter(|_| same("status", status)).map(|before| before["lastTransitionTime"].clone());
    let mut condition = json!({
        "type": CONDITION,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since.unwrap_or_else(|| written(now).into()),
    });
    if let Some(generation) = generation {
        condition["observedGeneration"] = generation.into();
    }
    all.push(condition);
    if !policy["status"].is_object() {
        policy["status"] = json!({});
    }
    policy["status"]["conditions"] = all.into();
    true
}

/// What an Event's name ends in: the same for the same problem of the same policy.
fn event_suffix(finding: &Finding, problem: &str) -> String {
    let text = format!("{}\n{}\n{problem}", finding.policy, finding.uid.as_deref().unwrap_or_default());
    let hash = digest::digest(&digest::SHA256, text.as_bytes());
    hash.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn shortened(text: &str) -> String {
    if text.len() <= LONGEST {
        return text.to_owned();
    }
    let end = (0..=LONGEST - 3).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    format!("{}...", &text[..end])
}

#[cfg(test)]
mod tests;
