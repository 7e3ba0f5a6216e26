use super::*;
use crate::model::TrustDomain;
use crate::policy::evaluate::Cause;

/// A verdict without further remarks.
fn bare(verdict: Verdict) -> Evaluation {
    Evaluation { verdict, cause: Cause::DenyMatched, dry_run: vec![], audited: vec![] }
}

fn page(metrics: &Metrics) -> String {
    let mut page = String::new();
    metrics.encode(&mut page).expect("a page");
    page
}

fn has(metrics: &Metrics, line: &str) {
    let page = page(metrics);
    assert!(page.lines().any(|found| found == line), "no `{line}` in\n{page}");
}

/// One series of each metric at least.
fn filled() -> Metrics {
    let metrics = Metrics::new("node-a");
    let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().expect("an identity");
    metrics.read_capture_outcomes_from(Box::new(|| vec![("captured", 3), ("passed_outside", 4)]));
    metrics.handshake(Side::Client, "ok", Duration::from_millis(3));
    metrics.certificate_request("issued");
    metrics.certificate_held(&identity, 1_900_000_000);
    metrics.evaluation(&Evaluation {
        dry_run: vec![("shop/trial".into(), Action::Deny)],
        audited: vec!["shop/watch".into()],
        ..bare(Verdict::Deny { by: Some("shop/deny-all".into()) })
    });
    metrics.evaluation(&bare(Verdict::Allow { by: None }));
    metrics.set_xds_connected(true);
    metrics.xds_received().count("address", 3, 1, 700);
    metrics.set_enrolled_pods(12);
    metrics.plaintext_refused();
    metrics
}

#[test]
fn every_metric_has_the_name_that_is_documented() {
    let metrics = filled();
    let _tunnel = metrics.tunnel(Side::Server);
    for line in [
        concat!(r#"culvert_build_info{version=""#, env!("CARGO_PKG_VERSION"), r#"",node="node-a"} 1"#),
        r#"culvert_connections_closed_total{reason="finished"} 0"#,
        r#"culvert_capture_outcomes_total{outcome="captured"} 3"#,
        r#"culvert_capture_outcomes_total{outcome="passed_outside"} 4"#,
        r#"culvert_handshakes_total{side="client",result="ok"} 1"#,
        r#"culvert_handshake_duration_seconds_count{side="client"} 1"#,
        r#"culvert_handshake_duration_seconds_bucket{le="0.004",side="client"} 1"#,
        r#"culvert_handshake_duration_seconds_count{side="server"} 0"#,
        r#"culvert_certificate_requests_total{result="issued"} 1"#,
        r#"culvert_certificate_expiry_timestamp_seconds{identity="spiffe://cluster.local/ns/shop/sa/cart"} 1900000000"#,
        r#"culvert_policy_verdicts_total{policy="shop/deny-all",verdict="deny",dry_run="false"} 1"#,
        r#"culvert_policy_verdicts_total{policy="-",verdict="allow",dry_run="false"} 1"#,
        r#"culvert_policy_verdicts_total{policy="shop/trial",verdict="deny",dry_run="true"} 1"#,
        r#"culvert_policy_verdicts_total{policy="shop/watch",verdict="audit",dry_run="false"} 1"#,
        "culvert_xds_connected 1",
        r#"culvert_xds_resources_received_total{type="address"} 3"#,
        r#"culvert_xds_resources_removed_total{type="address"} 1"#,
        r#"culvert_xds_received_bytes_total{type="address"} 700"#,
        "culvert_enrolled_pods 12",
        r#"culvert_tunnels_open{side="server"} 1"#,
        r#"culvert_tunnels_open{side="client"} 0"#,
        r#"culvert_connections_open{direction="inbound"} 0"#,
        "culvert_plaintext_refused_total 1",
        "# TYPE culvert_log_lines_dropped counter",
        "# TYPE istio_tcp_connections_failed counter",
    ] {
        has(&metrics, line);
    }
}

#[test]
fn no_family_is_described_twice() {
    let page = page(&Metrics::new("node-a"));
    let mut families: Vec<_> = page.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    let all = families.len();
    families.sort_unstable();
    families.dedup();
    assert_eq!(families.len(), all);
}

#[test]
fn a_tunnel_counts_until_it_is_dropped() {
    let metrics = Metrics::new("node-a");
    let tunnels = [metrics.tunnel(Side::Client), metrics.tunnel(Side::Client)];
    has(&metrics, r#"culvert_tunnels_open{side="client"} 2"#);
    drop(tunnels);
    has(&metrics, r#"culvert_tunnels_open{side="client"} 0"#);
}

#[test]
fn a_dropped_certificate_leaves_no_series() {
    let metrics = Metrics::new("node-a");
    let domain: TrustDomain = "cluster.local".parse().expect("a trust domain");
    let identity = SpiffeId::new(domain, "shop", "cart").expect("an identity");
    metrics.certificate_held(&identity, 1);
    assert!(page(&metrics).contains("sa/cart"));
    metrics.certificate_dropped(&identity);
    assert!(!page(&metrics).contains("sa/cart"));
}

#[test]
fn verdicts_of_ever_new_policies_do_not_grow_the_page_for_ever() {
    let metrics = Metrics::new("node-a");
    for index in 0..MAX_VERDICT_SERIES + 10 {
        metrics.policy_verdict(Some(&format!("shop/policy-{index}")), "deny", false);
    }
    has(&metrics, r#"culvert_policy_verdicts_total{policy="overflow",verdict="deny",dry_run="false"} 10"#);
    metrics.policy_verdict(Some("shop/policy-0"), "deny", false);
    has(&metrics, r#"culvert_policy_verdicts_total{policy="shop/policy-0",verdict="deny",dry_run="false"} 2"#);
}

#[test]
fn a_policy_name_can_not_break_the_page() {
    let metrics = Metrics::new("node-a");
    metrics.policy_verdict(Some("shop/\"} 1\nfake 2"), "deny", false);
    has(&metrics, r#"culvert_policy_verdicts_total{policy="shop/\"} 1\nfake 2",verdict="deny",dry_run="false"} 1"#);
}

/// The names of the metrics that a query asks for.
fn metrics_of(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
    words.filter(|word| word.starts_with("culvert_") || word.starts_with("istio_"))
}

#[test]
fn every_metric_that_the_dashboard_shows_exists() {
    let page = page(&filled());
    let families: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let dashboard = include_str!("../../../../deploy/dashboards/culvert.json");
    let dashboard: serde_json::Value = serde_json::from_str(dashboard).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let mut shown = std::collections::BTreeSet::new();
    for query in targets.map(|target| target["expr"].as_str().expect("a query")) {
        for name in metrics_of(query) {
            let family = ["_total", "_info", "_bucket"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
            assert!(families.contains(&family), "{name} in `{query}` is none of {families:?}");
            shown.insert(family);
        }
    }
    let hidden: Vec<_> = families.iter().filter(|family| !shown.contains(**family)).collect();
    assert!(hidden.is_empty(), "the dashboard does not show {hidden:?}");
}
