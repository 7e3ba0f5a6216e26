use std::fs;
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::{Mesh, NODES, config, names, pod, start};
use crate::proto::ADDRESS_TYPE;

#[tokio::test(flavor = "multi_thread")]
async fn root_and_tokens_survive_a_restart() {
    let mut mesh = Mesh::start(&[]).await;
    let before = (mesh.root(), mesh.token("node-a"), mesh.token("node-b"));
    mesh.restart().await;
    assert_eq!((mesh.root(), mesh.token("node-a"), mesh.token("node-b")), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_for_their_owner_only() {
    let mesh = Mesh::start(&[]).await;
    let mode = |name: &str| fs::metadata(mesh.state.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca-key.pem"), mode("tokens/node-a"), mode("tokens"), mode("root-cert.pem")), (0o600, 0o600, 0o700, 0o644));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_incomplete_root_is_reported_and_left_as_it_is() {
    let mesh = Mesh::start(&[]).await;
    let other = Mesh::start(&[]).await;
    let (key, certificate) = (mesh.state.path().join("ca-key.pem"), mesh.state.path().join("root-cert.pem"));
    let good = fs::read_to_string(&certificate).unwrap();
    let foreign = fs::read_to_string(other.state.path().join("root-cert.pem")).unwrap();
    let cut = good[..good.len() / 2].to_owned();
    for bad in [foreign, cut, String::new()] {
        fs::write(&certificate, &bad).unwrap();
        let error = start(config(mesh.manifests.path(), mesh.state.path())).await.unwrap_err();
        assert!(format!("{error:#}").contains("root-cert.pem"), "{error:#}");
        assert_eq!(fs::read_to_string(&certificate).unwrap(), bad);
    }
    fs::write(&certificate, &good).unwrap();
    fs::remove_file(&key).unwrap();
    let error = start(config(mesh.manifests.path(), mesh.state.path())).await.unwrap_err();
    assert!(format!("{error:#}").contains("ca-key.pem is missing"), "{error:#}");
    assert!(!key.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_named() {
    let mesh = Mesh::start(&[]).await;
    let mut config = config(mesh.manifests.path(), mesh.state.path());
    config.listen = mesh.address();
    let error = format!("{:#}", start(config).await.unwrap_err());
    assert!(error.contains(&mesh.address().to_string()), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manifests_may_come_after_the_controller() {
    let (manifests, state) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let directory = manifests.path().join("deep/er");
    let running = start(config(&directory, state.path())).await.unwrap();
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("nodes.yaml"), NODES).unwrap();
    fs::write(directory.join("web.yaml"), pod("web", "node-a", "10.1.0.2")).unwrap();
    let token = state.path().join("tokens/node-a");
    while !token.exists() {
        tokio::task::yield_now().await;
    }
    let mesh = Mesh { manifests, state, running: Some(running) };
    let mut stream = mesh.discovery("node-a").await;
    let (resources, _) = stream.all(ADDRESS_TYPE, &[]).await;
    let resources = if resources.is_empty() { stream.next().await.unwrap().resources } else { resources };
    assert_eq!(names(&resources), ["Kubernetes//Pod/shop/web"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn open_streams_do_not_keep_the_controller_from_stopping() {
    let mut mesh = Mesh::start(&[]).await;
    let mut stream = mesh.discovery("node-a").await;
    stream.all(ADDRESS_TYPE, &[]).await;
    let began = std::time::Instant::now();
    mesh.running.take().unwrap().stop().await.unwrap();
    assert!(began.elapsed() < super::super::GRACE, "it took {:?}", began.elapsed());
    assert_eq!(stream.next().await.unwrap_err().code(), tonic::Code::Unavailable);
}
