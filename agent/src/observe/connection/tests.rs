use std::sync::atomic::Ordering::Relaxed;

use super::fixtures::{exposition, info, stranger};
use super::*;

/// The value of the one series of `name` whose labels hold all of `labels`; none without such a series.
fn series(page: &str, name: &str, labels: &[&str]) -> Option<u64> {
    let of_name = page.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let found: Vec<_> = of_name.filter(|line| labels.iter().all(|label| line.contains(label))).collect();
    assert!(found.len() <= 1, "several series: {found:#?}");
    found.first().map(|line| line.rsplit(' ').next().expect("a value").parse().expect("a number"))
}

#[test]
fn the_exposed_labels_are_istios() {
    let observer = Observer::new("node-a");
    let _open = observer.open(info());
    let labels = concat!(
        r#"{reporter="source",source_workload="cart",source_canonical_service="cart",source_app="cart","#,
        r#"source_canonical_revision="v1",source_version="v1",source_workload_namespace="shop","#,
        r#"source_principal="spiffe://cluster.local/ns/shop/sa/cart",source_cluster="Kubernetes","#,
        r#"destination_service="stock.store.svc.cluster.local",destination_service_name="stock","#,
        r#"destination_service_namespace="store",destination_workload="stock",destination_canonical_service="stock","#,
        r#"destination_app="stock",destination_canonical_revision="v1",destination_version="v1","#,
        r#"destination_workload_namespace="store",destination_principal="spiffe://cluster.local/ns/store/sa/stock","#,
        r#"destination_cluster="Kubernetes",connection_security_policy="mutual_tls",request_protocol="tcp",response_flags="-"}"#,
    );
    let page = exposition(&observer);
    for (name, value) in [
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 0),
        ("istio_tcp_sent_bytes_total", 0),
        ("istio_tcp_received_bytes_total", 0),
    ] {
        assert!(page.lines().any(|line| line == format!("{name}{labels} {value}")), "no {name}{labels} {value} in\n{page}");
    }
    assert!(page.ends_with("# EOF\n"));
}

#[test]
fn what_is_not_known_reads_unknown() {
    let observer = Observer::new("node-a");
    drop(observer.open(stranger()));
    let unknown = [
        r#"reporter="destination""#,
        r#"source_workload="unknown""#,
        r#"source_principal="unknown""#,
        r#"source_cluster="unknown""#,
        r#"destination_workload="stock""#,
        r#"destination_principal="unknown""#,
        r#"destination_service="unknown""#,
        r#"connection_security_policy="none""#,
    ];
    assert_eq!(series(&exposition(&observer), "istio_tcp_connections_opened_total", &unknown), Some(1));
}

#[test]
fn bytes_show_while_the_connection_runs_and_are_exact_at_its_end() {
    let observer = Observer::new("node-a");
    let connection = observer.open(info());
    let bytes = connection.bytes();
    let read = || {
        let page = exposition(&observer);
        (series(&page, "istio_tcp_received_bytes_total", &[]), series(&page, "istio_tcp_sent_bytes_total", &[]))
    };
    bytes.sent.fetch_add(100, Relaxed);
    assert_eq!(read(), (Some(100), Some(0)));
    assert_eq!(read(), (Some(100), Some(0)), "a second scrape counted the bytes again");
    bytes.sent.fetch_add(11, Relaxed);
    bytes.received.fetch_add(5_000_000_001, Relaxed);
    connection.close(CloseReason::Finished, None);
    assert_eq!(read(), (Some(111), Some(5_000_000_001)));
}

#[test]
fn scrapes_during_a_close_neither_lose_nor_double_a_byte() {
    let observer = Observer::new("node-a");
    for _ in 0..200 {
        let connection = observer.open(info());
        let scraper = observer.clone();
        let scrape = std::thread::spawn(move || exposition(&scraper));
        for _ in 0..50 {
            connection.bytes().sent.fetch_add(7, Relaxed);
        }
        connection.close(CloseReason::Finished, None);
        scrape.join().expect("no panic");
    }
    assert_eq!(series(&exposition(&observer), "istio_tcp_received_bytes_total", &[]), Some(200 * 50 * 7));
}

#[test]
fn a_connection_that_is_dropped_without_a_word_was_drained() {
    let observer = Observer::new("node-a");
    drop(observer.open(info()));
    let page = exposition(&observer);
    let flags = [r#"response_flags="draining""#];
    assert_eq!(series(&page, "istio_tcp_connections_closed_total", &flags), Some(1));
    assert_eq!(series(&page, "culvert_connections_closed_total", &[r#"reason="draining""#]), Some(1));
}

#[test]
fn a_closed_connection_is_not_closed_again_by_its_drop() {
    let observer = Observer::new("node-a");
    observer.open(info()).close(CloseReason::SourceReset, None);
    let page = exposition(&observer);
    assert_eq!(series(&page, "istio_tcp_connections_closed_total", &[]), Some(1));
    assert_eq!(series(&page, "istio_tcp_connections_closed_total", &[r#"response_flags="-""#]), Some(1));
    assert_eq!(series(&page, "culvert_connections_closed_total", &[r#"reason="source_reset""#]), Some(1));
    assert_eq!(series(&page, "culvert_connections_closed_total", &[r#"reason="draining""#]), Some(0));
}

#[test]
fn a_failed_connection_counts_as_failed_and_not_as_opened() {
    let observer = Observer::new("node-a");
    observer.fail(&info(), CloseReason::DestinationRefused, &"connection refused");
    let page = exposition(&observer);
    assert_eq!(series(&page, "istio_tcp_connections_opened_total", &[]), Some(0));
    assert_eq!(series(&page, "istio_tcp_connections_closed_total", &[]), Some(0));
    let flags = [r#"response_flags="destination_refused""#];
    assert_eq!(series(&page, "istio_tcp_connections_failed_total", &flags), Some(1));
    assert_eq!(series(&page, "culvert_connections_closed_total", &[r#"reason="destination_refused""#]), Some(1));
    assert_eq!(observer.open_count(), 0);
}

#[test]
fn open_connections_are_listed_until_they_end_in_the_pods_own_view() {
    let observer = Observer::new("node-a");
    let (out, inbound) = (observer.open(info()), observer.open(stranger()));
    for connection in [&out, &inbound] {
        connection.bytes().sent.store(10, Relaxed);
        connection.bytes().received.store(20, Relaxed);
    }
    let list = observer.open_connections(10);
    let bytes: Vec<_> = list.iter().map(|view| (view.info.direction, view.bytes_sent, view.bytes_received)).collect();
    assert_eq!(bytes, [(Direction::Outbound, 10, 20), (Direction::Inbound, 20, 10)]);
    assert_eq!((observer.open_connections(1).len(), observer.open_count()), (1, 2));
    let gauge = |direction: &str| series(&exposition(&observer), "culvert_connections_open", &[direction]);
    assert_eq!((gauge("outbound"), gauge("inbound")), (Some(1), Some(1)));
    out.close(CloseReason::Finished, None);
    assert_eq!((gauge("outbound"), gauge("inbound"), observer.open_count()), (Some(0), Some(1), 1));
}

#[test]
fn a_connection_that_others_have_carried_counts_as_one_that_was_opened_and_closed() {
    let page = |tell: fn(&Observer)| {
        let observer = Observer::new("node-a");
        tell(&observer);
        exposition(&observer)
    };
    let carried = page(|observer| {
        observer.carried(&observer.recurring(&info()), 40_000, [5, 7], Duration::from_secs(1), CloseReason::DestinationReset);
    });
    let watched = page(|observer| {
        let open = observer.open(info());
        open.bytes().sent.store(5, Relaxed);
        open.bytes().received.store(7, Relaxed);
        open.close_after(Duration::from_secs(1), CloseReason::DestinationReset);
    });
    assert_eq!(carried, watched);
    assert_eq!(series(&carried, "istio_tcp_received_bytes_total", &[]), Some(5));
}
