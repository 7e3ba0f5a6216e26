//! The cluster's name server: answers for the names of services and, where a service has no address of its own, of its endpoints, as the
//! API server tells them. It knows no other names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Packet, PacketFlag, QTYPE, RCODE, ResourceRecord, TYPE};

use super::network::CONTROL_PLANE_ADDR;
use super::{Cluster, control_plane, forward};

const DOMAIN: &str = "cluster.local";
/// Short: names change while tests run.
const TTL: u32 = 1;
const AGAIN: Duration = Duration::from_millis(500);

/// Serves until it is killed.
pub(super) fn run(cluster: &Cluster) -> Result<()> {
    forward::enter_control_plane(cluster)?;
    let names = Arc::new(Mutex::new(Names::default()));
    for kind in ["services", "endpoints"] {
        let (cluster, names) = (cluster.clone(), Arc::clone(&names));
        thread::spawn(move || {
            loop {
                if let Err(error) = follow(&cluster, kind, &names) {
                    eprintln!("following {kind}: {error:#}");
                }
                // The API server is away, or ended the watch: what is known stays in force until it is back.
                thread::sleep(AGAIN);
            }
        });
    }
    serve(&names)
}

/// A service's namespace and name.
type Service = (String, String);
/// An endpoint's address, and its host name where it has one.
type Endpoint = (Ipv4Addr, Option<String>);

/// What has which addresses.
#[derive(Debug, Default)]
struct Names {
    /// All services, with the address of each that has one of its own.
    services: BTreeMap<Service, Option<Ipv4Addr>>,
    endpoints: BTreeMap<Service, BTreeSet<Endpoint>>,
}

impl Names {
    /// Takes a change of an object.
    fn change(&mut self, gone: bool, object: &Value) {
        let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let key = (text("/metadata/namespace"), text("/metadata/name"));
        match (text("/kind").as_str(), gone) {
            ("Service", false) => drop(self.services.insert(key, text("/spec/clusterIP").parse().ok())),
            ("Service", true) => drop(self.services.remove(&key)),
            (_, false) => drop(self.endpoints.insert(key, endpoints(object))),
            (_, true) => drop(self.endpoints.remove(&key)),
        }
    }

    /// The addresses of a name; none if it is not there.
    fn look_up(&self, name: &str) -> Option<Vec<Ipv4Addr>> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let name = name.strip_suffix(&format!(".svc.{DOMAIN}"))?;
        let (front, namespace) = name.rsplit_once('.')?;
        let (host, service) = front.rsplit_once('.').map_or((None, front), |(host, service)| (Some(host), service));
        let key = (namespace.to_owned(), service.to_owned());
        if let (Some(address), None) = (self.services.get(&key)?, host) {
            return Some(vec![*address]);
        }
        let endpoints = self.endpoints.get(&key).into_iter().flatten();
        let found: Vec<Ipv4Addr> =
            endpoints.filter(|(_, name)| host.is_none() || name.as_deref() == host).map(|(address, _)| *address).collect();
        (host.is_none() || !found.is_empty()).then_some(found)
    }
}

fn endpoints(object: &Value) -> BTreeSet<Endpoint> {
    let list = |value: &Value, name: &str| value.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let subsets = list(object, "subsets");
    let addresses = subsets.iter().flat_map(|subset| list(subset, "addresses"));
    addresses
        .filter_map(|address| {
            let host = address.get("hostname").and_then(Value::as_str).map(str::to_owned);
            Some((address.get("ip")?.as_str()?.parse().ok()?, host))
        })
        .collect()
}

/// Follows all objects of a kind until the watch ends.
fn follow(cluster: &Cluster, kind: &str, names: &Mutex<Names>) -> Result<()> {
    let mut command = control_plane::inner_kubectl(cluster);
    command.args(["get", kind, "--all-namespaces", "--watch", "--output-watch-events", "--output", "json"]);
    let mut watch = command.stdout(Stdio::piped()).spawn().context("starting kubectl")?;
    let output = watch.stdout.take().context("a piped output")?;
    for event in serde_json::Deserializer::from_reader(output).into_iter::<Value>() {
        let event = event?;
        let gone = event.get("type").and_then(Value::as_str) == Some("DELETED");
        if let Some(object) = event.get("object") {
            lock(names).change(gone, object);
        }
    }
    watch.wait()?;
    Ok(())
}

fn serve(names: &Mutex<Names>) -> Result<()> {
    let socket = UdpSocket::bind(SocketAddr::from((CONTROL_PLANE_ADDR, 53))).context("the name server's port")?;
    forward::notify_ready()?;
    let mut question = [0; 1500];
    loop {
        let (length, client) = socket.recv_from(&mut question)?;
        match answer(&question[..length], &lock(names)) {
            Ok(reply) => drop(socket.send_to(&reply, client)),
            Err(error) => eprintln!("{client} asks what cannot be read: {error}"),
        }
    }
}

fn answer(question: &[u8], names: &Names) -> Result<Vec<u8>, simple_dns::SimpleDnsError> {
    let query = Packet::parse(question)?;
    let mut reply = Packet::new_reply(query.id());
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER | PacketFlag::RECURSION_AVAILABLE);
    if query.has_flags(PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    for asked in &query.questions {
        match names.look_up(&asked.qname.to_string()) {
            None => *reply.rcode_mut() = RCODE::NameError,
            Some(addresses) if matches!(asked.qtype, QTYPE::TYPE(TYPE::A) | QTYPE::ANY) => {
                let record = |address: Ipv4Addr| {
                    ResourceRecord::new(asked.qname.clone(), CLASS::IN, TTL, RData::A(A { address: address.into() }))
                };
                reply.answers.extend(addresses.into_iter().map(record));
            }
            Some(_no_such_record) => {}
        }
    }
    reply.questions = query.questions.clone();
    reply.build_bytes_vec_compressed()
}

fn lock(names: &Mutex<Names>) -> MutexGuard<'_, Names> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names() -> Names {
        let mut names = Names::default();
        let object = |kind: &str, name: &str| json!({"kind": kind, "metadata": {"namespace": "shop", "name": name}});
        let mut web = object("Service", "web");
        web["spec"] = json!({"clusterIP": "10.96.1.1"});
        let mut db = object("Service", "db");
        db["spec"] = json!({"clusterIP": "None"});
        let mut endpoints = object("Endpoints", "db");
        endpoints["subsets"] = json!([{"addresses": [{"ip": "10.244.1.2", "hostname": "db-0"}, {"ip": "10.244.2.2"}]}]);
        for object in [&web, &db, &endpoints] {
            names.change(false, object);
        }
        names
    }

    #[test]
    fn a_service_has_its_own_address_and_a_headless_one_those_of_its_endpoints() {
        let names = names();
        let check = |name: &str, wanted: Option<&[&str]>| {
            let found = names.look_up(name).map(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>());
            assert_eq!(found, wanted.map(|wanted| wanted.iter().map(ToString::to_string).collect()), "{name}");
        };
        check("web.shop.svc.cluster.local.", Some(&["10.96.1.1"]));
        check("Web.shop.svc.cluster.local", Some(&["10.96.1.1"]));
        check("db.shop.svc.cluster.local", Some(&["10.244.1.2", "10.244.2.2"]));
        check("db-0.db.shop.svc.cluster.local", Some(&["10.244.1.2"]));
        check("db-1.db.shop.svc.cluster.local", None);
        check("web.other.svc.cluster.local", None);
        check("web.shop.svc.cluster.local.shop.svc.cluster.local", None);
        check("example.com", None);
    }

    #[test]
    fn an_answer_repeats_the_question_and_a_name_without_such_a_record_is_no_error() {
        let ask = |name: &str, kind: TYPE| {
            let mut query = Packet::new_query(7);
            let name = simple_dns::Name::new_unchecked(name).into_owned();
            query.questions.push(simple_dns::Question::new(name, kind.into(), CLASS::IN.into(), false));
            answer(&query.build_bytes_vec().unwrap(), &names()).unwrap()
        };
        let reply = ask("web.shop.svc.cluster.local", TYPE::A);
        let reply = Packet::parse(&reply).unwrap();
        assert_eq!((reply.id(), reply.questions.len(), reply.answers.len()), (7, 1, 1));
        let reply = ask("web.shop.svc.cluster.local", TYPE::AAAA);
        let reply = Packet::parse(&reply).unwrap();
        assert_eq!((reply.rcode(), reply.answers.len()), (RCODE::NoError, 0));
        let reply = ask("nobody.shop.svc.cluster.local", TYPE::A);
        assert_eq!(Packet::parse(&reply).unwrap().rcode(), RCODE::NameError);
    }
}
