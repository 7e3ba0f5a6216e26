use super::*;

fn config() -> AgentConfig {
    AgentConfig {
        node: "node-a".into(),
        controller: "https://controller:15012".parse().expect("an address"),
        root_cert: "/nowhere/root-cert.pem".into(),
        token_file: "/nowhere/token".into(),
        netns_dir: "/run/netns".into(),
        cgroup_root: None,
        excluded_namespaces: Vec::new(),
        kubelet_names: vec!["kubelet".into()],
        bpf_dir: "/sys/fs/bpf/culvert".into(),
        state_dir: "/var/lib/culvert".into(),
        metrics_listen: METRICS_LISTEN,
        ready_listen: READY_LISTEN,
        admin_listen: ADMIN_LISTEN,
        log_format: LogFormat::Text,
        tunnel_form: TunnelForm::Auto,
        workers: 2,
        drain_timeout: Duration::from_secs(10),
    }
}

#[test]
fn files_may_appear_later() {
    assert_eq!(config().validate(), Ok(config()));
}

#[test]
fn a_controller_address_is_read_and_written() {
    let check = |text: &str, host: &str, port: u16, shown: &str| {
        let address: ControllerAddress = text.parse().expect(text);
        assert_eq!((address.host(), address.port(), address.to_string().as_str()), (host, port, shown));
    };
    check("https://10.0.0.1:15012", "10.0.0.1", 15012, "https://10.0.0.1:15012");
    check("https://controller.mesh.svc/", "controller.mesh.svc", 15012, "https://controller.mesh.svc:15012");
    check("https://[fd00::1]:9", "fd00::1", 9, "https://[fd00::1]:9");
}

#[test]
fn addresses_that_are_no_controller_are_refused_with_the_right_form() {
    for text in [
        "",
        "controller:15012",
        "http://controller:15012",
        "https://",
        "https://controller:0",
        "https://controller:99999",
        "https://controller:15012/path",
        "https://controller:15012?query",
        "https://user@controller:15012",
        "https://bad host:1",
    ] {
        let error = text.parse::<ControllerAddress>().expect_err(text).to_string();
        assert!(
            error.starts_with(&format!("`{text}` is not the address of a controller")) && error.contains("https://HOST:PORT")
        );
    }
}

#[test]
fn a_node_name_must_be_one() {
    for name in ["", "a/b", "a b", &"n".repeat(254)] {
        let error = AgentConfig { node: name.to_owned(), ..config() }.validate().expect_err(name).to_string();
        assert!(error.starts_with("--node: "), "{error}");
    }
}

#[test]
fn servers_need_addresses_of_their_own() {
    let at = |text: &str| parse_listen(text).expect(text);
    let check = |metrics: &str, admin: &str, fine: bool| {
        let config = AgentConfig { metrics_listen: at(metrics), admin_listen: at(admin), ..config() };
        assert_eq!(config.validate().is_ok(), fine, "{metrics} and {admin}");
    };
    check("127.0.0.1:7000", "127.0.0.1:7001", true);
    check("127.0.0.1:7000", "127.0.0.2:7000", true);
    check("127.0.0.1:0", "127.0.0.1:0", true);
    check("127.0.0.1:7000", "127.0.0.1:7000", false);
    check(":7000", "127.0.0.1:7000", false);
}

#[test]
fn a_directory_is_no_token_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let error = AgentConfig { token_file: directory.path().into(), ..config() }.validate().expect_err("refused").to_string();
    assert!(error.starts_with("--token-file: ") && error.ends_with("is a directory: name the file"), "{error}");
}

#[test]
fn listening_addresses_are_read() {
    assert_eq!(parse_listen("127.0.0.1:15000").map(|addr| addr.to_string()), Ok("127.0.0.1:15000".into()));
    assert_eq!(parse_listen(":15020").map(|addr| addr.to_string()), Ok("0.0.0.0:15020".into()));
    assert_eq!(parse_listen("[::1]:1").map(|addr| addr.to_string()), Ok("[::1]:1".into()));
    for text in ["", "15020", "localhost:1", "1.2.3.4", "1.2.3.4:99999"] {
        assert_eq!(parse_listen(text), Err(ConfigError::Listen(text.to_owned())));
    }
}

#[test]
fn durations_are_read() {
    for (text, millis) in [("10s", 10_000), ("250ms", 250), ("2m", 120_000), ("24h", 86_400_000), ("0s", 0)] {
        assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)));
    }
    for text in ["", "10", "s", "-1s", "1.5s", "10 s", "25h", "99999999999999999999s", "18446744073709551615h"] {
        assert_eq!(parse_duration(text), Err(ConfigError::Duration(text.to_owned())));
    }
}

#[test]
fn a_certificate_lives_longer_than_no_time() {
    assert_eq!(parse_lifetime("500ms"), Ok(Duration::from_millis(500)));
    assert_eq!(parse_lifetime("0s"), Err(ConfigError::Lifetime("0s".to_owned())));
    assert_eq!(parse_lifetime("25h"), Err(ConfigError::Duration("25h".to_owned())));
}
