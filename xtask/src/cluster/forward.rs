//! A way from this machine's loopback to the API server, which is in a network namespace: connections that come in here go out there.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::thread;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

use super::network::{CONTROL_PLANE, CONTROL_PLANE_ADDR};
use super::{Cluster, control_plane, network, pki};

/// Listens, writes the kubeconfig that says where, and serves until it is killed.
pub(super) fn run(cluster: &Cluster) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a port of loopback")?;
    let server = format!("https://{}", listener.local_addr()?);
    pki::kubeconfig(cluster, "admin", &control_plane::local_kubeconfig(cluster), &server)?;
    enter_control_plane(cluster)?;
    notify_ready()?;
    for client in listener.incoming() {
        let client = client.context("accepting")?;
        thread::spawn(move || {
            if let Err(error) = carry(client) {
                eprintln!("a connection to the API server failed: {error}");
            }
        });
    }
    Ok(())
}

/// Moves this process, which has but one thread yet, into the control plane's network namespace. Sockets stay where they were made.
pub(super) fn enter_control_plane(cluster: &Cluster) -> Result<()> {
    let path = network::path(&cluster.netns(CONTROL_PLANE));
    let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).context("entering the control plane's network namespace")
}

/// Tells who started this process that it serves.
pub(super) fn notify_ready() -> Result<()> {
    let socket = std::env::var_os("NOTIFY_SOCKET").context("NOTIFY_SOCKET names the socket to say it to")?;
    UnixDatagram::unbound()?.send_to(b"READY=1", socket).context("saying that it serves")?;
    Ok(())
}

fn carry(client: TcpStream) -> io::Result<()> {
    let server = TcpStream::connect(SocketAddr::from((CONTROL_PLANE_ADDR, 6443)))?;
    let (client_again, server_again) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || copy(client_again, server_again));
    copy(server, client);
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    if io::copy(&mut from, &mut to).is_err() {
        let _gone = to.shutdown(Shutdown::Both);
    }
    let _gone = to.shutdown(Shutdown::Write);
}
