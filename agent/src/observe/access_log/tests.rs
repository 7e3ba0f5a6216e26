use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use super::super::connection::fixtures::{info, stranger};
use super::super::connection::{ConnectionInfo, Observer};
use super::super::log::LogFormat;
use super::super::log::tests::logged;
use super::*;

fn close(info: ConnectionInfo, reason: CloseReason, detail: Option<&dyn fmt::Display>) {
    let connection = Observer::new("node-a").open(info);
    connection.bytes().sent.store(517, Relaxed);
    connection.bytes().received.store(1_048_576, Relaxed);
    connection.close(reason, detail);
}

/// The one line that `act` logs, without what differs from run to run.
fn json_line(act: impl FnOnce()) -> Value {
    let text = logged(LogFormat::Json, "info", act);
    assert_eq!(text.lines().count(), 1, "{text}");
    let mut value: Value = serde_json::from_str(&text).expect("a JSON object");
    let object = value.as_object_mut().expect("an object");
    assert!(object.remove("timestamp").is_some());
    assert!(object.remove("duration_ms").is_some_and(|duration| duration.is_u64()));
    value
}

#[test]
fn a_tunnelled_connection_is_told_whole() {
    let expected = json!({
        "level": "INFO",
        "target": "access",
        "message": "connection closed",
        "src.addr": "10.1.0.1:40000",
        "src.workload": "cart-0",
        "src.namespace": "shop",
        "src.identity": "spiffe://cluster.local/ns/shop/sa/cart",
        "dst.addr": "10.1.1.2:8080",
        "dst.original_addr": "10.96.0.7:80",
        "dst.service": "stock.store.svc.cluster.local",
        "dst.workload": "stock-0",
        "dst.namespace": "store",
        "dst.identity": "spiffe://cluster.local/ns/store/sa/stock",
        "direction": "outbound",
        "security": "mutual_tls",
        "bytes_sent": 517,
        "bytes_recv": 1_048_576,
        "reason": "finished",
    });
    assert_eq!(json_line(|| close(info(), CloseReason::Finished, None)), expected);
}

#[test]
fn what_is_not_known_is_left_out_and_bytes_are_the_pods_own() {
    let expected = json!({
        "level": "WARN",
        "target": "access",
        "message": "connection closed",
        "src.addr": "192.0.2.9:50000",
        "dst.addr": "10.1.1.2:8080",
        "dst.workload": "stock-0",
        "dst.namespace": "store",
        "direction": "inbound",
        "security": "plaintext",
        "bytes_sent": 1_048_576,
        "bytes_recv": 517,
        "reason": "policy_changed",
        "detail": "store/deny-all",
    });
    assert_eq!(json_line(|| close(stranger(), CloseReason::PolicyChanged, Some(&"store/deny-all"))), expected);
}

#[test]
fn a_failed_connection_has_a_line_with_its_error() {
    let observer = Observer::new("node-a");
    let line = json_line(|| observer.fail(&info(), CloseReason::PeerNotAuthenticated, &"certificate expired"));
    assert_eq!(line["message"], "connection failed");
    assert_eq!(line["level"], "WARN");
    assert_eq!((&line["reason"], &line["error"]), (&json!("peer_not_authenticated"), &json!("certificate expired")));
    assert_eq!((&line["bytes_sent"], &line["bytes_recv"]), (&json!(0), &json!(0)));
}

#[test]
fn a_text_line_reads_as_key_and_value() {
    let text = logged(LogFormat::Text, "info", || close(info(), CloseReason::Finished, None));
    for part in [
        " INFO access: connection closed src.addr=10.1.0.1:40000 ",
        r#" src.identity=spiffe://cluster.local/ns/shop/sa/cart "#,
        r#" direction="outbound" security="mutual_tls" bytes_sent=517 bytes_recv=1048576 "#,
        r#" reason="finished""#,
    ] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
}

#[test]
fn a_detail_from_a_peer_can_not_add_a_line_or_flood_the_log() {
    let forged = format!("oops\n2026-01-01 INFO access: forged\u{1b}[31m{}", "x".repeat(10_000));
    let text = logged(LogFormat::Text, "info", || close(info(), CloseReason::TunnelFailed, Some(&forged)));
    assert_eq!(text.lines().count(), 1);
    assert!(!text.contains('\u{1b}') && text.len() < 2_000, "{} bytes", text.len());
}

#[test]
fn the_end_of_pod_or_agent_is_no_warning() {
    for (reason, level) in [
        (CloseReason::Draining, "INFO"),
        (CloseReason::PodGone, "INFO"),
        (CloseReason::SourceReset, "INFO"),
        (CloseReason::TunnelFailed, "WARN"),
    ] {
        assert_eq!(json_line(|| close(info(), reason, None))["level"], level, "{reason}");
    }
}

#[test]
fn an_address_is_written_as_the_library_writes_it() {
    for text in ["10.0.0.255:65535", "0.0.0.0:0", "[2001:db8::1]:443", "[::ffff:10.0.0.1]:80"] {
        let mut fields = Fields { form: Form::Text, out: String::new() };
        let port = fields.address("to", text.parse().expect("an address"));
        assert_eq!(fields.out, format!(" to={text}"));
        assert_eq!(Some(&fields.out[port]), text.rsplit(':').next());
    }
}

#[test]
fn connections_with_common_participants_have_the_lines_that_each_would_have_alone() {
    let ended =
        Ended { bytes_sent: 5, bytes_received: 7, duration: Duration::from_secs(1), reason: CloseReason::Finished, detail: None };
    let mut one = info();
    let participants = Participants::new(&one);
    for port in [1, 40_000, 65_535] {
        one.source_addr.set_port(port);
        for form in ["{}", "{:#}"] {
            let written = |who| {
                let line = Line { message: "connection closed", who, ended: &ended, detail: "detail" };
                if form == "{}" { format!("{line}") } else { format!("{line:#}") }
            };
            let alone = written(Who::One(&one));
            assert!(alone.contains(&format!("10.1.0.1:{port}")), "{alone}");
            assert_eq!(written(Who::OneOf(&participants, port)), alone);
        }
    }
}

#[test]
fn a_name_that_needs_it_is_written_out_in_either_form() {
    let mut strange = info();
    let mut workload = strange.source.as_deref().expect("a source").clone();
    workload.name = "a\"b\n\u{9b}é".into();
    strange.source = Some(Arc::new(workload));
    let line = json_line(|| close(strange.clone(), CloseReason::Finished, None));
    assert_eq!(line["src.workload"], "a\"b\n\u{9b}é");
    let text = logged(LogFormat::Text, "info", || close(strange, CloseReason::Finished, None));
    assert!(text.contains(r#" src.workload="a\"b\n\u{9b}é" "#) && text.lines().count() == 1, "{text}");
}
