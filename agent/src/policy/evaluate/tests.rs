use proptest::prelude::*;

use super::*;
use crate::model::snapshot::Edit;
use crate::model::{Authorization, Scope, Snapshot, Workload};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn flow(identity: Option<&str>) -> Flow {
    Flow {
        source_identity: identity.map(|id| id.parse().unwrap()),
        source: "10.1.2.3:4711".parse().unwrap(),
        destination: "10.9.8.7:8080".parse().unwrap(),
    }
}

fn rule(part: Match) -> Rule {
    Rule { clauses: vec![Clause { matches: vec![part] }] }
}

fn matches(part: &Match, flow: &Flow) -> bool {
    rule(part.clone()).matches(&Source::of(flow))
}

fn everything() -> Vec<Rule> {
    vec![Rule::default()]
}

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Authorization {
    Authorization { namespace: "shop".into(), name: name.into(), scope: Scope::Namespace, action, dry_run: false, rules }
}

fn dry(policy: Authorization) -> Authorization {
    Authorization { dry_run: true, ..policy }
}

fn ruling(policies: impl IntoIterator<Item = Authorization>, default_deny: bool) -> Evaluation {
    evaluate(&flow(Some(CART)), &policies.into_iter().map(Arc::new).collect(), &[], default_deny)
}

fn allow(by: Option<&str>) -> Verdict {
    Verdict::Allow { by: by.map(Into::into) }
}

fn deny(by: Option<&str>) -> Verdict {
    Verdict::Deny { by: by.map(Into::into) }
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn prefix(text: &str) -> StringMatch {
    StringMatch::Prefix(text.into())
}

fn suffix(text: &str) -> StringMatch {
    StringMatch::Suffix(text.into())
}

fn block(text: &str) -> IpBlock {
    crate::policy::field::ip_block(text).unwrap()
}

fn account(namespace: &str, name: &str) -> ServiceAccountMatch {
    ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() }
}

/// Checks a field and its negation with a value that is the flow's and one that is not, with and without identity.
macro_rules! check_field {
    ($field:ident, $not_field:ident, needs_identity: $identity:expr, yes: $yes:expr, no: $no:expr) => {
        let (with, without) = (flow(Some(CART)), flow(None));
        for yes in $yes {
            let wanted = Match { $field: vec![yes.clone()], ..Match::default() };
            let unwanted = Match { $not_field: vec![yes.clone()], ..Match::default() };
            assert!(matches(&wanted, &with), "{} {yes:?}", stringify!($field));
            assert!(!matches(&unwanted, &with), "{} {yes:?}", stringify!($not_field));
            assert_eq!(matches(&wanted, &without), !$identity, "{} {yes:?} without identity", stringify!($field));
            assert_eq!(matches(&unwanted, &without), $identity, "{} {yes:?} without identity", stringify!($not_field));
            for no in $no {
                let either = Match { $field: vec![no.clone(), yes.clone()], ..Match::default() };
                let neither = Match { $not_field: vec![no.clone(), yes.clone()], ..Match::default() };
                assert!(matches(&either, &with), "{} {no:?} or {yes:?}", stringify!($field));
                assert!(!matches(&neither, &with), "{} {no:?} nor {yes:?}", stringify!($not_field));
                let both = Match { $field: vec![yes.clone()], $not_field: vec![no.clone()], ..Match::default() };
                assert!(matches(&both, &with), "{} {yes:?} but not {no:?}", stringify!($field));
            }
        }
        for no in $no {
            let wanted = Match { $field: vec![no.clone()], ..Match::default() };
            let unwanted = Match { $not_field: vec![no.clone()], ..Match::default() };
            for flow in [&with, &without] {
                assert!(!matches(&wanted, flow), "{} {no:?}", stringify!($field));
                assert!(matches(&unwanted, flow), "{} {no:?}", stringify!($not_field));
            }
        }
    };
}

#[test]
fn namespaces_and_their_negation() {
    check_field!(namespaces, not_namespaces, needs_identity: true,
        yes: [exact("shop"), prefix("sh"), prefix("shop"), suffix("op"), suffix("shop"), StringMatch::Presence],
        no: [exact("sho"), exact("shops"), prefix("shops"), prefix("op"), suffix("sh"), suffix("xshop"), exact("")]);
}

#[test]
fn principals_and_their_negation() {
    let whole = "cluster.local/ns/shop/sa/cart";
    check_field!(principals, not_principals, needs_identity: true,
        yes: [exact(whole), prefix("cluster.local/ns/shop/"), suffix("/sa/cart"), suffix("cart"), StringMatch::Presence],
        no: [exact(CART), exact("cluster.local/ns/shop/sa/car"), prefix("spiffe:"), prefix("ns/shop"), suffix("/sa/art"), exact("*")]);
}

#[test]
fn service_accounts_and_their_negation() {
    check_field!(service_accounts, not_service_accounts, needs_identity: true,
        yes: [account("shop", "cart")],
        no: [account("shop", "car"), account("pay", "cart"), account("cart", "shop"), account("", "")]);
}

#[test]
fn source_addresses_and_their_negation() {
    check_field!(source_ips, not_source_ips, needs_identity: false,
        yes: [block("10.1.2.3"), block("10.1.2.0/24"), block("10.1.2.2/31"), block("0.0.0.0/0"), block("::ffff:10.1.2.3")],
        no: [block("10.1.2.4"), block("10.1.3.0/24"), block("10.1.2.4/30"), block("10.9.8.7"), block("::/0")]);
}

#[test]
fn destination_addresses_and_their_negation() {
    check_field!(destination_ips, not_destination_ips, needs_identity: false,
        yes: [block("10.9.8.7"), block("10.9.0.0/16"), block("10.9.8.99/24"), block("0.0.0.0/0")],
        no: [block("10.9.8.6"), block("10.1.2.3"), block("11.0.0.0/8"), block("::/0")]);
}

#[test]
fn destination_ports_and_their_negation() {
    check_field!(destination_ports, not_destination_ports, needs_identity: false, yes: [8080], no: [80, 4711, 0]);
}

#[test]
fn ipv6_blocks_hold_ipv6_addresses_only() {
    let mut flow = flow(None);
    flow.source = "[fd00:1:2::3]:4711".parse().unwrap();
    for (text, expected) in [
        ("fd00:1:2::3", true),
        ("fd00:1:2::2/127", true),
        ("fd00:1::/32", true),
        ("::/0", true),
        ("fd00:1:2::4", false),
        ("fd00:2::/32", false),
        ("0.0.0.0/0", false),
    ] {
        assert_eq!(matches(&Match { source_ips: vec![block(text)], ..Match::default() }, &flow), expected, "{text}");
    }
}

#[test]
fn a_block_with_an_absurd_length_holds_its_own_address_only() {
    let absurd = IpBlock { address: "10.1.2.3".parse().unwrap(), length: 255 };
    assert!(absurd.contains("10.1.2.3".parse().unwrap()));
    assert!(!absurd.contains("10.1.2.2".parse().unwrap()));
}

#[test]
fn fields_are_anded_matches_ored_clauses_anded_and_rules_ored() {
    let yes = || Match { destination_ports: vec![8080], ..Match::default() };
    let no = || Match { destination_ports: vec![80], ..Match::default() };
    let (flow, clause) = (flow(Some(CART)), |matches| Clause { matches });
    let rule = |clauses| Rule { clauses }.matches(&Source::of(&flow));
    assert!(!matches(&Match { namespaces: vec![exact("pay")], ..yes() }, &flow));
    assert!(matches(&Match { namespaces: vec![exact("shop")], ..yes() }, &flow));
    assert!(rule(vec![clause(vec![no(), yes()])]));
    assert!(!rule(vec![clause(vec![yes()]), clause(vec![no()])]));
    assert!(rule(vec![clause(vec![yes()]), clause(vec![yes(), no()])]));
    assert!(rule(vec![]), "a rule without clauses matches every connection");
    assert!(!rule(vec![clause(vec![])]), "a clause without matches matches none");
    assert!(rule(vec![clause(vec![Match::default()])]), "a match without fields matches every connection");
    let policy = policy("p", Action::Deny, vec![super::tests::rule(no()), super::tests::rule(yes())]);
    assert_eq!(ruling([policy], false).verdict, deny(Some("shop/p")));
}

#[test]
fn without_policies_the_mesh_decides() {
    let open = ruling([], false);
    assert_eq!((open.verdict, open.cause), (allow(None), Cause::AllowedByDefault));
    let closed = ruling([], true);
    assert_eq!((closed.verdict, closed.cause), (deny(None), Cause::DeniedByDefault));
}

#[test]
fn deny_goes_before_allow_in_any_order() {
    let yes = || policy("yes", Action::Allow, everything());
    let no = || policy("no", Action::Deny, everything());
    for policies in [[yes(), no()], [no(), yes()]] {
        let found = ruling(policies, false);
        assert_eq!((found.verdict, found.cause), (deny(Some("shop/no")), Cause::DenyMatched));
    }
}

#[test]
fn an_allow_policy_shuts_out_what_no_allow_matches() {
    for default_deny in [false, true] {
        let nothing = policy("nothing", Action::Allow, vec![]);
        let found = ruling([nothing.clone()], default_deny);
        assert_eq!((found.verdict, found.cause), (deny(None), Cause::NoAllowMatched));
        let found = ruling([nothing, policy("all", Action::Allow, everything())], default_deny);
        assert_eq!((found.verdict, found.cause), (allow(Some("shop/all")), Cause::AllowMatched));
    }
}

#[test]
fn a_deny_policy_that_does_not_match_leaves_the_decision_to_the_mesh() {
    let elsewhere = || policy("no", Action::Deny, vec![rule(Match { destination_ports: vec![80], ..Match::default() })]);
    assert_eq!(ruling([elsewhere()], false).verdict, allow(None));
    assert_eq!(ruling([elsewhere()], true).verdict, deny(None));
}

#[test]
fn audit_policies_are_counted_and_decide_nothing() {
    let audits = || [policy("seen", Action::Audit, everything()), policy("unseen", Action::Audit, vec![])];
    for (default_deny, verdict) in [(false, allow(None)), (true, deny(None))] {
        let found = ruling(audits(), default_deny);
        assert_eq!((found.verdict, found.audited), (verdict, vec!["shop/seen".into()]));
    }
}

#[test]
fn of_ten_thousand_policies_only_those_for_the_source_are_looked_at() {
    let allow = |number: usize, part: Match| Arc::new(policy(&format!("p{number}"), Action::Allow, vec![rule(part)]));
    let client = |number| Match { principals: vec![exact(&format!("cluster.local/ns/n{number}/sa/a"))], ..Match::default() };
    let kinds = |number: usize| match number % 4 {
        0 => client(number),
        1 => Match { namespaces: vec![exact(&format!("n{number}"))], ..Match::default() },
        2 => Match { service_accounts: vec![account(&format!("n{number}"), "a")], ..Match::default() },
        _ => Match { destination_ports: vec![10_000 + number as u16], ..Match::default() },
    };
    let mut edit = Snapshot::empty("n1").edit();
    edit.upsert_workload(destination());
    (0..10_000).for_each(|number| edit.upsert_policy(Authorization::clone(&allow(number, kinds(number)))));
    let judged = |edit: Edit| {
        let (policies, missing) = edit.finish().policies_for(&destination());
        let flow = flow(Some(CART));
        (policies.candidates(&flow).len(), evaluate(&flow, &policies, &missing, false).cause)
    };
    let snapshot = edit.finish();
    assert_eq!(judged(snapshot.edit()), (0, Cause::NoAllowMatched));
    let cart = Match { principals: vec![exact(CART.trim_start_matches("spiffe://"))], ..Match::default() };
    let mut edit = snapshot.edit();
    edit.upsert_policy(Authorization::clone(&allow(10_000, cart.clone())));
    assert_eq!(judged(edit), (1, Cause::AllowMatched));
    let mut edit = snapshot.edit();
    edit.upsert_policy(Authorization { action: Action::Deny, ..Authorization::clone(&allow(0, cart)) });
    assert_eq!(judged(edit), (1, Cause::DenyMatched), "a policy that changes is found by what it says now");
    let mut edit = snapshot.edit();
    (0..10_000).for_each(|number| edit.remove_policy(&format!("shop/p{number}")));
    assert_eq!(judged(edit), (0, Cause::AllowedByDefault));
}

fn destination() -> Workload {
    let pod = crate::model::snapshot::tests::pod("web", "10.9.8.7");
    Workload { identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(), ..pod }
}

#[test]
fn a_policy_that_has_not_been_received_denies() {
    let missing = ["shop/late".into(), "shop/later".into()];
    let allow_all = [Arc::new(policy("all", Action::Allow, everything()))].into_iter().collect();
    let found = evaluate(&flow(Some(CART)), &allow_all, &missing, false);
    assert_eq!((found.verdict, found.cause), (deny(Some("shop/late")), Cause::PolicyNotReceived));
}

#[test]
fn dry_run_policies_decide_nothing_and_tell_what_they_would() {
    let told = |policies: Vec<Authorization>| {
        let found = ruling(policies, false);
        let dry_run: Vec<_> = found.dry_run.iter().map(|(key, action)| (key.to_string(), *action)).collect();
        (found.verdict, dry_run, found.audited.len())
    };
    let (all, nothing) = (everything, Vec::new);
    let one = |action| vec![("shop/d".to_owned(), action)];
    assert_eq!(told(vec![dry(policy("d", Action::Deny, all()))]), (allow(None), one(Action::Deny), 0));
    assert_eq!(told(vec![dry(policy("d", Action::Deny, nothing()))]), (allow(None), vec![], 0));
    assert_eq!(told(vec![dry(policy("d", Action::Allow, nothing()))]), (allow(None), one(Action::Deny), 0));
    assert_eq!(told(vec![dry(policy("d", Action::Allow, all()))]), (allow(None), one(Action::Allow), 0));
    assert_eq!(told(vec![dry(policy("d", Action::Audit, all()))]), (allow(None), one(Action::Audit), 0));
    assert_eq!(told(vec![dry(policy("d", Action::Audit, nothing()))]), (allow(None), vec![], 0));
    let yes = policy("yes", Action::Allow, all());
    assert_eq!(told(vec![dry(policy("d", Action::Allow, nothing())), yes]), (allow(Some("shop/yes")), vec![], 0));
    let (other, d) = (dry(policy("e", Action::Allow, nothing())), dry(policy("d", Action::Allow, all())));
    assert_eq!(told(vec![other, d]), (allow(None), one(Action::Allow), 0));
}

#[test]
fn a_dry_run_allow_does_not_soften_the_default() {
    let found = ruling([dry(policy("d", Action::Allow, everything()))], true);
    assert_eq!((found.verdict, found.cause), (deny(None), Cause::DeniedByDefault));
    let found = ruling([dry(policy("d", Action::Allow, everything())), policy("n", Action::Allow, vec![])], false);
    assert_eq!((found.verdict, found.cause), (deny(None), Cause::NoAllowMatched));
}

fn any_flow() -> impl Strategy<Value = Flow> {
    let name = "[ab]{1,3}";
    let identity =
        (name, name).prop_map(|(namespace, account)| format!("spiffe://td/ns/{namespace}/sa/{account}").parse().unwrap());
    let v4 = any::<u32>().prop_map(|bits| IpAddr::V4(bits.into()));
    let v6 = any::<u128>().prop_map(|bits| IpAddr::V6(bits.into()).to_canonical());
    let address = prop_oneof![v4, v6].boxed();
    let parts = (proptest::option::of(identity), address.clone(), address, 1..4u16);
    parts.prop_map(|(source_identity, source, destination, port)| Flow {
        source_identity,
        source: (source, 4711).into(),
        destination: (destination, port).into(),
    })
}

fn any_string_match() -> impl Strategy<Value = StringMatch> {
    let text = || "[ab]{1,2}".prop_map(Arc::from);
    prop_oneof![
        text().prop_map(StringMatch::Exact),
        "td/ns/[ab]/sa/[ab]".prop_map(|principal| exact(&principal)),
        text().prop_map(StringMatch::Prefix),
        text().prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence)
    ]
}

fn any_block() -> impl Strategy<Value = IpBlock> {
    let v4 = (any::<u32>(), 0..=32u8).prop_map(|(bits, length)| IpBlock { address: IpAddr::V4(bits.into()), length });
    let v6 = (any::<u128>(), 0..=128u8).prop_map(|(bits, length)| IpBlock { address: IpAddr::V6(bits.into()), length });
    prop_oneof![v4, v6]
}

/// A match with one field, and the one with its negation.
fn any_field() -> impl Strategy<Value = (Match, Match)> {
    macro_rules! field {
        ($values:expr, $field:ident, $not_field:ident) => {
            proptest::collection::vec($values, 1..4).prop_map(|values| {
                let wanted = Match { $field: values.clone(), ..Match::default() };
                (wanted, Match { $not_field: values, ..Match::default() })
            })
        };
    }
    let accounts = ("[ab]{1,2}", "[ab]{1,2}").prop_map(|(namespace, name)| account(&namespace, &name));
    prop_oneof![
        field!(any_string_match(), namespaces, not_namespaces),
        field!(any_string_match(), principals, not_principals),
        field!(accounts, service_accounts, not_service_accounts),
        field!(any_block(), source_ips, not_source_ips),
        field!(any_block(), destination_ips, not_destination_ips),
        field!(0..5u16, destination_ports, not_destination_ports),
    ]
}

fn any_policy() -> impl Strategy<Value = Authorization> {
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny), Just(Action::Audit)];
    let part = (any_field(), any::<bool>()).prop_map(|((wanted, unwanted), negated)| if negated { unwanted } else { wanted });
    let rules = proptest::collection::vec(part.prop_map(rule), 0..3);
    (action, any::<bool>(), rules).prop_map(|(action, dry_run, rules)| Authorization { dry_run, ..policy("p", action, rules) })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let both = (any_field(), any_field(), any_field()).prop_map(|((one, _), (other, _), (_, unwanted))| Match {
        namespaces: [one.namespaces, other.namespaces].concat(),
        service_accounts: [one.service_accounts, other.service_accounts].concat(),
        principals: [one.principals, other.principals].concat(),
        destination_ports: [one.destination_ports, other.destination_ports].concat(),
        ..unwanted
    });
    let clause = proptest::collection::vec(both, 0..3).prop_map(|matches| Clause { matches });
    proptest::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses })
}

proptest! {
    #[test]
    fn a_field_and_its_negation_never_agree(flow in any_flow(), (wanted, unwanted) in any_field()) {
        prop_assert_ne!(matches(&wanted, &flow), matches(&unwanted, &flow));
    }

    #[test]
    fn a_block_holds_what_agrees_in_its_first_bits(block in any_block(), address in any::<u128>()) {
        let address = if block.address.is_ipv4() { IpAddr::V4((address as u32).into()) } else { IpAddr::V6(address.into()) };
        let net = ipnet::IpNet::new(block.address, block.length).unwrap();
        prop_assert_eq!(block.contains(address), net.contains(&address));
        prop_assert!(block.contains(block.address));
    }

    #[test]
    fn one_more_deny_or_default_deny_never_opens(
        flow in any_flow(),
        policies in proptest::collection::vec(any_policy().prop_map(Arc::new), 0..4),
        further in any_policy(),
    ) {
        let more = policies.iter().cloned().chain([Arc::new(Authorization { action: Action::Deny, ..further })]).collect();
        let policies = policies.into_iter().collect();
        let before = evaluate(&flow, &policies, &[], false);
        let after = evaluate(&flow, &more, &[], false);
        prop_assert!(before.verdict.allowed() || !after.verdict.allowed());
        prop_assert!(before.verdict.allowed() || !evaluate(&flow, &policies, &[], true).verdict.allowed());
        prop_assert!(!evaluate(&flow, &policies, &["shop/late".into()], false).verdict.allowed());
    }

    #[test]
    fn a_policy_that_matches_is_never_left_out(
        flow in any_flow(),
        action in prop_oneof![Just(Action::Allow), Just(Action::Deny), Just(Action::Audit)],
        rules in proptest::collection::vec(any_rule(), 0..3),
    ) {
        let matches = rules.iter().any(|rule| rule.matches(&Source::of(&flow)));
        let one: Applicable = [Arc::new(policy("p", action, rules))].into_iter().collect();
        prop_assert!(!matches || one.candidates(&flow).len() == 1);
    }

    #[test]
    fn dry_runs_and_audits_never_change_a_verdict(
        flow in any_flow(),
        policies in proptest::collection::vec(any_policy().prop_map(Arc::new), 0..5),
        default_deny in any::<bool>(),
    ) {
        let enforced = |policy: &&Arc<Authorization>| !policy.dry_run && policy.action != Action::Audit;
        let only = policies.iter().filter(enforced).cloned().collect();
        let all = evaluate(&flow, &policies.iter().cloned().collect(), &[], default_deny);
        prop_assert_eq!(all.verdict, evaluate(&flow, &only, &[], default_deny).verdict);
    }
}
