use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    args: AgentArgs,
}

const NEEDED: [&str; 9] =
    ["agent", "--node", "node-a", "--controller", "https://c:15012", "--root-cert", "/r.pem", "--token-file", "/t"];

fn parse(more: &[&str]) -> Result<AgentArgs, clap::Error> {
    Command::try_parse_from(NEEDED.iter().chain(more)).map(|command| command.args)
}

#[test]
fn the_needed_flags_are_enough() {
    let config = parse(&[]).expect("parsed").into_config().expect("valid");
    assert_eq!((config.netns_dir.to_str(), config.cgroup_root), (Some("/run/netns"), None));
    assert_eq!((config.bpf_dir.to_str(), config.state_dir.to_str()), (Some("/sys/fs/bpf/culvert"), Some("/var/lib/culvert")));
    let listens = [config.metrics_listen, config.ready_listen, config.admin_listen].map(|addr| addr.to_string());
    assert_eq!(listens, ["0.0.0.0:15020", "0.0.0.0:15021", "127.0.0.1:15000"]);
    assert_eq!((config.log_format, config.drain_timeout), (LogFormat::Text, Duration::from_secs(10)));
    assert_eq!(config.tunnel_form, TunnelForm::Auto);
    assert!(config.workers >= 1);
}

#[test]
fn every_flag_is_taken() {
    let flags = [
        ["--netns-dir", "/n"],
        ["--cgroup-root", "/c"],
        ["--bpf-dir", "/b"],
        ["--state-dir", "/s"],
        ["--metrics-listen", "127.0.0.1:1"],
        ["--ready-listen", "127.0.0.1:2"],
        ["--admin-listen", "[::1]:3"],
        ["--log-format", "json"],
        ["--tunnel-form", "hbone"],
        ["--workers", "3"],
        ["--drain-timeout", "1m"],
    ];
    let config = parse(flags.as_flattened()).expect("parsed").into_config().expect("valid");
    assert_eq!((config.netns_dir, config.cgroup_root), ("/n".into(), Some("/c".into())));
    assert_eq!((config.bpf_dir, config.admin_listen.to_string()), ("/b".into(), "[::1]:3".to_owned()));
    assert_eq!(config.state_dir, PathBuf::from("/s"));
    assert_eq!((config.log_format, config.workers, config.drain_timeout), (LogFormat::Json, 3, Duration::from_secs(60)));
    assert_eq!(config.tunnel_form, TunnelForm::Hbone);
}

#[test]
fn wrong_values_are_refused_with_what_is_right() {
    let check = |flag: &str, value: &str, hint: &str| {
        let error = parse(&[flag, value]).expect_err("refused").to_string();
        assert!(error.contains(hint), "{error}");
    };
    check("--log-format", "xml", "[possible values: text, json]");
    check("--tunnel-form", "h3", "[possible values: auto, hbone]");
    check("--metrics-listen", "here", "write IP:PORT");
    check("--drain-timeout", "soon", "such as 10s");
    check("--workers", "0", "1..=1024");
}
