//! Authorization policies as users write them, to what can be told of a TCP connection.
//!
//! Enters: an [`AuthorizationPolicy`] and what it needs to know of the mesh. Leaves: a [`model::Authorization`](Authorization), which
//! workloads it selects, and [`Problem`]s where it does not do what it says. A condition that a TCP connection cannot answer never
//! opens anything: an ALLOW or AUDIT rule with one never matches, a DENY rule takes it for met.
//!
//! The result holds no match without fields and no clause without matches, because agents disagree on what those mean: a
//! clause that always matches is left out of its rule, a rule that never matches is left out of its policy.

use std::collections::BTreeMap;

use super::objects::{AuthorizationPolicy, AuthorizationPolicySpec, Condition, Operation, PolicyAction, Selector, Source};
use super::{Problem, field, objects};
use crate::model::{Action, Authorization, Clause, IpBlock, Match, Rule, Scope, ServiceAccountMatch, StringMatch, TrustDomain};

/// The annotations that make a policy a dry run, with the value `true`.
pub const DRY_RUN_ANNOTATIONS: [&str; 2] = ["culvert.dev/dry-run", "istio.io/dry-run"];

/// The trust domain that, in a principal, stands for the mesh's own.
const OWN_TRUST_DOMAIN: &str = "cluster.local/";

/// What a policy's meaning depends on besides itself.
#[derive(Clone, Debug)]
pub struct MeshContext {
    /// The namespace whose policies are for all namespaces.
    pub root_namespace: String,
    /// The mesh's own trust domain.
    pub trust_domain: TrustDomain,
}

/// A policy as agents evaluate it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// What agents evaluate; none when the policy is not for workloads at all.
    pub authorization: Option<Authorization>,
    /// Labels that a workload must all have. Empty unless the scope is [`Scope::WorkloadSelector`].
    pub selector: BTreeMap<String, String>,
    /// What does not do what it says.
    pub problems: Vec<Problem>,
}

/// Why a policy has no meaning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// A field has a value that it cannot have.
    #[error("AuthorizationPolicy {policy}: {field}: `{value}` is not {expected}")]
    Value {
        /// The policy, as `namespace/name`.
        policy: String,
        /// The path of the field.
        field: String,
        /// What stands there.
        value: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// The policy says twice, in different ways, what it is for.
    #[error("AuthorizationPolicy {policy}: spec.selector and spec.targetRefs are both set: keep one of them")]
    SelectorAndTarget {
        /// The policy, as `namespace/name`.
        policy: String,
    },
}

impl Compiled {
    /// Whether a workload names this policy in its `authorization_policies`: it has a selector, and that selects the workload. A
    /// selector in the root namespace selects in all namespaces.
    #[must_use]
    pub fn selects(&self, mesh: &MeshContext, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        self.authorization.as_ref().is_some_and(|policy| {
            policy.scope == Scope::WorkloadSelector
                && (*policy.namespace == *mesh.root_namespace || *policy.namespace == *namespace)
                && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        })
    }
}

/// Compiles a policy.
///
/// # Errors
/// [`CompileError`] names the field that has no meaning. Keep the policy's last good state then.
pub fn authorization(object: &AuthorizationPolicy, mesh: &MeshContext) -> Result<Compiled, CompileError> {
    let empty = AuthorizationPolicySpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);
    let mut compiler = Compiler::new(object, mesh, spec.action);
    let selector = compiler.selector(spec.selector.as_ref())?;
    if spec.target_ref.is_some() || !spec.target_refs.is_empty() {
        if spec.selector.is_some() {
            return Err(CompileError::SelectorAndTarget { policy: object.key() });
        }
        compiler.report_target(spec);
        return Ok(Compiled { authorization: None, selector, problems: compiler.problems });
    }
    let scope = match (selector.is_empty(), object.namespace() == mesh.root_namespace) {
        (false, _) => Scope::WorkloadSelector,
        (true, true) => Scope::Global,
        (true, false) => Scope::Namespace,
    };
    compiler.report_action(spec);
    let mut rules = Vec::new();
    for (index, rule) in spec.rules.iter().enumerate() {
        rules.extend(compiler.rule(&format!("spec.rules[{index}]"), rule)?);
    }
    let authorization = Authorization {
        namespace: object.namespace().into(),
        name: object.name().into(),
        scope,
        action: enforced_as(spec.action),
        dry_run: compiler.dry_run(),
        rules,
    };
    Ok(Compiled { authorization: Some(authorization), selector, problems: compiler.problems })
}

fn enforced_as(action: PolicyAction) -> Action {
    match action {
        PolicyAction::Allow => Action::Allow,
        PolicyAction::Deny | PolicyAction::Custom => Action::Deny,
        PolicyAction::Audit => Action::Audit,
    }
}

struct Compiler<'a> {
    object: &'a AuthorizationPolicy,
    mesh: &'a MeshContext,
    action: Action,
    problems: Vec<Problem>,
    /// The rule at hand has a condition that a TCP connection cannot answer.
    unanswerable: bool,
}

impl<'a> Compiler<'a> {
    fn new(object: &'a AuthorizationPolicy, mesh: &'a MeshContext, action: PolicyAction) -> Self {
        Self { object, mesh, action: enforced_as(action), problems: Vec::new(), unanswerable: false }
    }

    fn selector(&self, selector: Option<&Selector>) -> Result<BTreeMap<String, String>, CompileError> {
        let labels = selector.map(|selector| selector.match_labels.clone()).unwrap_or_default();
        for (key, value) in &labels {
            let path = format!("spec.selector.matchLabels.{key}");
            if key.is_empty() || key.contains('*') {
                return Err(self.bad(&path, key, "a label's key (wildcards are not supported)"));
            }
            if value.contains('*') {
                return Err(self.bad(&path, value, "a label's value (wildcards are not supported)"));
            }
        }
        Ok(labels)
    }

    fn report_target(&mut self, spec: &AuthorizationPolicySpec) {
        let targets = spec.target_ref.iter().map(|target| ("spec.targetRef".to_owned(), target));
        let listed = spec.target_refs.iter().enumerate();
        let targets = targets.chain(listed.map(|(index, target)| (format!("spec.targetRefs[{index}]"), target)));
        for (field, target) in targets {
            self.problems.push(Problem {
                field,
                value: format!("{}/{}", target.kind, target.name),
                message: "is enforced by a waypoint, not by agents; use spec.selector for a policy on workloads".to_owned(),
                effect: "the policy applies to no workload",
            });
        }
    }

    fn report_action(&mut self, spec: &AuthorizationPolicySpec) {
        let provider = spec.provider.as_ref().map_or("", |provider| provider.name.as_str());
        let mut report = |field: &str, value: &str, message: &str, effect| {
            let (field, value, message) = (field.to_owned(), value.to_owned(), message.to_owned());
            self.problems.push(Problem { field, value, message, effect });
        };
        match spec.action {
            PolicyAction::Custom => report(
                "spec.action",
                &format!("CUSTOM (provider {provider:?})"),
                "needs an external authorizer, which is not asked for TCP connections",
                "the policy denies what it matches",
            ),
            PolicyAction::Allow | PolicyAction::Deny | PolicyAction::Audit if spec.provider.is_some() => {
                report("spec.provider", provider, "belongs to the action CUSTOM", "the provider is ignored");
            }
            PolicyAction::Deny if spec.rules.is_empty() => report(
                "spec.rules",
                "",
                "is empty, so that the policy never matches; write `rules: [{}]` to match every connection",
                "the policy denies nothing",
            ),
            PolicyAction::Allow | PolicyAction::Deny | PolicyAction::Audit => {}
        }
    }

    fn dry_run(&mut self) -> bool {
        let mut dry_run = false;
        let annotations = self.object.metadata.annotations.iter().flatten();
        for (key, value) in annotations.filter(|(key, _)| DRY_RUN_ANNOTATIONS.contains(&key.as_str())) {
            match value.as_str() {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => dry_run = true,
                "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => {}
                _ => self.problems.push(Problem {
                    field: format!("metadata.annotations[{key}]"),
                    value: value.clone(),
                    message: "is neither `true` nor `false`".to_owned(),
                    effect: "the annotation is ignored",
                }),
            }
        }
        dry_run
    }

    /// The rule; none if it never matches.
    fn rule(&mut self, path: &str, rule: &objects::Rule) -> Result<Option<Rule>, CompileError> {
        self.unanswerable = false;
        let mut clauses = Vec::new();
        if let Some(from) = &rule.from {
            let sources = from.iter().map(|from| &from.source);
            clauses.extend(self.clause(&format!("{path}.from"), "source", sources, Self::source)?);
        }
        if let Some(to) = &rule.to {
            let operations = to.iter().map(|to| &to.operation);
            clauses.extend(self.clause(&format!("{path}.to"), "operation", operations, Self::operation)?);
        }
        for (index, condition) in rule.when.iter().enumerate() {
            let found = self.condition(&format!("{path}.when[{index}]"), condition)?;
            clauses.extend(constraining(vec![found]));
        }
        let never = self.unanswerable && self.action != Action::Deny;
        Ok((!never).then_some(Rule { clauses }))
    }

    /// The alternatives of `from` or `to`; none if they do not constrain.
    fn clause<'b, T: Default + PartialEq + 'b>(
        &mut self,
        path: &str,
        name: &str,
        parts: impl Iterator<Item = &'b T>,
        compile: impl Fn(&mut Self, &str, &T) -> Result<Match, CompileError>,
    ) -> Result<Option<Clause>, CompileError> {
        let mut matches = Vec::new();
        for (index, part) in parts.enumerate() {
            let path = format!("{path}[{index}].{name}");
            if *part == T::default() {
                self.report_unanswerable(&path, "", "is empty; name what is to match, or leave the whole list out to match all");
            }
            matches.push(compile(self, &path, part)?);
        }
        if matches.is_empty() {
            self.report_unanswerable(path, "", "is an empty list; leave it out to match all");
        }
        Ok(constraining(matches))
    }

    fn source(&mut self, path: &str, source: &Source) -> Result<Match, CompileError> {
        for (name, values) in [
            ("requestPrincipals", &source.request_principals),
            ("notRequestPrincipals", &source.not_request_principals),
            ("remoteIpBlocks", &source.remote_ip_blocks),
            ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
        ] {
            self.report_http(path, name, values);
        }
        for (name, values) in [("trustDomains", &source.trust_domains), ("notTrustDomains", &source.not_trust_domains)] {
            if !values.is_empty() {
                let message = "is not supported; write principals such as `<trust domain>/*`";
                self.report_unanswerable(&format!("{path}.{name}"), &values.join(", "), message);
            }
        }
        let at = |name: &str| format!("{path}.{name}");
        Ok(Match {
            namespaces: self.names(&at("namespaces"), &source.namespaces)?,
            not_namespaces: self.names(&at("notNamespaces"), &source.not_namespaces)?,
            service_accounts: self.service_accounts(&at("serviceAccounts"), &source.service_accounts)?,
            not_service_accounts: self.service_accounts(&at("notServiceAccounts"), &source.not_service_accounts)?,
            principals: self.principals(&at("principals"), &source.principals)?,
            not_principals: self.principals(&at("notPrincipals"), &source.not_principals)?,
            source_ips: self.ip_blocks(&at("ipBlocks"), &source.ip_blocks)?,
            not_source_ips: self.ip_blocks(&at("notIpBlocks"), &source.not_ip_blocks)?,
            ..Match::default()
        })
    }

    fn operation(&mut self, path: &str, operation: &Operation) -> Result<Match, CompileError> {
        for (name, values) in [
            ("hosts", &operation.hosts),
            ("notHosts", &operation.not_hosts),
            ("methods", &operation.methods),
            ("notMethods", &operation.not_methods),
            ("paths", &operation.paths),
            ("notPaths", &operation.not_paths),
        ] {
            self.report_http(path, name, values);
        }
        Ok(Match {
            destination_ports: self.ports(&format!("{path}.ports"), &operation.ports)?,
            not_destination_ports: self.ports(&format!("{path}.notPorts"), &operation.not_ports)?,
            ..Match::default()
        })
    }

    fn condition(&mut self, path: &str, condition: &Condition) -> Result<Match, CompileError> {
        if condition.values.is_empty() && condition.not_values.is_empty() {
            self.report_unanswerable(path, &condition.key, "has neither values nor notValues");
        }
        let (wanted, unwanted) = (format!("{path}.values"), format!("{path}.notValues"));
        let (values, not_values) = (&condition.values, &condition.not_values);
        let mut found = Match::default();
        match condition.key.as_str() {
            "source.ip" => {
                found.source_ips = self.ip_blocks(&wanted, values)?;
                found.not_source_ips = self.ip_blocks(&unwanted, not_values)?;
            }
            "source.namespace" => {
                found.namespaces = self.names(&wanted, values)?;
                found.not_namespaces = self.names(&unwanted, not_values)?;
            }
            "source.principal" => {
                found.principals = self.principals(&wanted, values)?;
                found.not_principals = self.principals(&unwanted, not_values)?;
            }
            "source.serviceAccount" => {
                found.service_accounts = self.service_accounts(&wanted, values)?;
                found.not_service_accounts = self.service_accounts(&unwanted, not_values)?;
            }
            "destination.ip" => {
                found.destination_ips = self.ip_blocks(&wanted, values)?;
                found.not_destination_ips = self.ip_blocks(&unwanted, not_values)?;
            }
            "destination.port" => {
                found.destination_ports = self.ports(&wanted, values)?;
                found.not_destination_ports = self.ports(&unwanted, not_values)?;
            }
            key => {
                let message = "cannot be told of a TCP connection; the keys that can are source.ip, source.namespace, \
                               source.principal, source.serviceAccount, destination.ip and destination.port";
                self.report_unanswerable(&format!("{path}.key"), key, message);
            }
        }
        Ok(found)
    }

    fn names(&mut self, path: &str, values: &[String]) -> Result<Vec<StringMatch>, CompileError> {
        self.each(path, values, "a name, optionally with a `*` at one end", |compiler, path, value| {
            let matcher = field::string_match(value)?;
            compiler.report_literal_star(path, value, &matcher);
            Some(matcher)
        })
    }

    fn principals(&mut self, path: &str, values: &[String]) -> Result<Vec<StringMatch>, CompileError> {
        const EXPECTED: &str =
            "a principal, `<trust domain>/ns/<namespace>/sa/<service account>`, optionally with a `*` at one end";
        self.each(path, values, EXPECTED, |compiler, path, value| {
            let bare = value.strip_prefix("spiffe://").unwrap_or(value);
            if bare != value {
                let message = "is a SPIFFE ID; principals are written without `spiffe://`".to_owned();
                let (field, value) = (path.to_owned(), value.to_owned());
                compiler.problems.push(Problem { field, value, message, effect: "it is read without that" });
            }
            let own = bare.strip_prefix(OWN_TRUST_DOMAIN).map(|rest| format!("{}/{rest}", compiler.mesh.trust_domain));
            let matcher = field::string_match(own.as_deref().unwrap_or(bare))?;
            compiler.report_literal_star(path, value, &matcher);
            Some(matcher)
        })
    }

    fn service_accounts(&mut self, path: &str, values: &[String]) -> Result<Vec<ServiceAccountMatch>, CompileError> {
        self.each(path, values, "a service account, `name` or `namespace/name`", |compiler, _, value| {
            field::service_account(value, compiler.object.namespace())
        })
    }

    fn ip_blocks(&mut self, path: &str, values: &[String]) -> Result<Vec<IpBlock>, CompileError> {
        self.each(path, values, "an address or a range such as 10.0.0.0/8 or fd00::/8", |_, _, value| field::ip_block(value))
    }

    fn ports(&mut self, path: &str, values: &[String]) -> Result<Vec<u16>, CompileError> {
        self.each(path, values, "a port from 1 to 65535", |_, _, value| field::port(value))
    }

    fn each<T>(
        &mut self,
        path: &str,
        values: &[String],
        expected: &'static str,
        read: impl Fn(&mut Self, &str, &str) -> Option<T>,
    ) -> Result<Vec<T>, CompileError> {
        let mut found = Vec::with_capacity(values.len());
        for (index, value) in values.iter().enumerate() {
            let path = format!("{path}[{index}]");
            found.push(read(self, &path, value).ok_or_else(|| self.bad(&path, value, expected))?);
        }
        Ok(found)
    }

    fn bad(&self, field: &str, value: &str, expected: &'static str) -> CompileError {
        CompileError::Value { policy: self.object.key(), field: field.to_owned(), value: value.to_owned(), expected }
    }

    fn report_literal_star(&mut self, path: &str, value: &str, matcher: &StringMatch) {
        if field::has_literal_star(matcher) {
            self.problems.push(Problem {
                field: path.to_owned(),
                value: value.to_owned(),
                message: "has a `*` that is no wildcard: only one, at one end, is".to_owned(),
                effect: "the value matches nobody",
            });
        }
    }

    fn report_http(&mut self, path: &str, name: &str, values: &[String]) {
        if !values.is_empty() {
            let message = "needs HTTP, which agents do not read";
            self.report_unanswerable(&format!("{path}.{name}"), &values.join(", "), message);
        }
    }

    /// Notes a condition that no answer can be given to, and so decides the rule at hand the safe way.
    fn report_unanswerable(&mut self, path: &str, value: &str, message: &str) {
        self.unanswerable = true;
        let effect = match self.action {
            Action::Allow => "the rule never matches, so that the policy allows less",
            Action::Deny => "the condition counts as met, so that the policy denies more",
            Action::Audit => "the rule never matches, so that the policy audits less",
        };
        let (field, value, message) = (path.to_owned(), value.to_owned(), message.to_owned());
        self.problems.push(Problem { field, value, message, effect });
    }
}

/// The clause of these alternatives; none if one of them always matches, or if there are none because they had no meaning.
fn constraining(matches: Vec<Match>) -> Option<Clause> {
    let constrains = !matches.is_empty() && matches.iter().all(|part| *part != Match::default());
    constrains.then_some(Clause { matches })
}

#[cfg(test)]
mod tests;
