//! What a cluster of 10,000 pods on 500 nodes costs: the controller that follows its API server, the time until a pod's change is known to
//! all agents, and what an agent is sent when it starts again. The objects are real, and so are the tokens; the nodes are not.

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kube::Client;
use tokio::runtime::Runtime;

use harness::mesh::binary;
use harness::{cgroup, eventually_within};

use crate::api::agents::Agents;
use crate::api::{self, ADDRESS, Api, Running, objects};
use crate::cpu::{most_resident, resident};
use crate::measure::memory::STARTED;
use crate::measure::{Scale, Values};
use crate::{interrupt, metrics};

const PATIENCE: Duration = Duration::from_secs(120);
const CONTROLLER: u16 = 15012;
/// Where the controller says whether it is ready, and the agent beside it.
const CONTROLLER_READY: u16 = 15021;
const AGENT_METRICS: u16 = 16020;
const AGENT_READY: u16 = 16021;
const AGENT_ADMIN: u16 = 16000;
/// The node of the agent that is a real one.
const NODE: usize = 7;
/// How many pods change while that is away.
const MEANWHILE: usize = 10;
/// How far apart in the order of pods those are that change.
const STRIDE: usize = 331;

/// What is measured on.
struct Stage<'a> {
    api: &'a Api,
    runtime: Runtime,
    client: Client,
    /// How many pods have changed.
    changes: usize,
}

pub(super) fn measure(scale: Scale) -> Result<Values> {
    let api = Arc::new(Api::start()?);
    let inside = Arc::clone(&api);
    // The threads of a runtime are where the thread is that makes it.
    api.namespace.run(move || measure_inside(&inside, scale))
}

fn measure_inside(api: &Api, scale: Scale) -> Result<Values> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let client = runtime.block_on(api::connect(&api.kubeconfig()))?;
    let mut stage = Stage { api, runtime, client, changes: 0 };
    let begun = Instant::now();
    stage.runtime.block_on(objects::make(&stage.client))?;
    eprintln!("        {} objects made in {:.0} s", objects::COUNT, begun.elapsed().as_secs_f64());
    let mut values = Values::new();
    let controller = stage.controller(&mut values)?;
    let mut agents = stage.agents(&controller, &mut values)?;
    for _ in 0..scale.pod_changes {
        interrupt::check()?;
        let before = agents.received();
        values.push(("change", stage.change(&mut agents)?.as_secs_f64() * 1e3));
        values.push(("change_bytes", (agents.received() - before) as f64 / objects::NODES as f64));
    }
    stage.agent(&mut agents, &mut values)?;
    drop(controller);
    stage.controller_again(&mut agents, &mut values)?;
    Ok(values)
}

impl Stage<'_> {
    /// Starts a controller, and waits until it serves.
    fn controller(&self, values: &mut Values) -> Result<Running> {
        let begun = Instant::now();
        let controller = self.start_controller("controller")?;
        values.push(("start", begun.elapsed().as_secs_f64()));
        std::thread::sleep(STARTED);
        values.push(("controller", resident(controller.id())? / 1e6));
        values.push(("controller_peak", most_resident(controller.id())? / 1e6));
        Ok(controller)
    }

    /// Starts another controller, and waits until the agents that have lost the first have nothing left to hear from it.
    fn controller_again(&self, agents: &mut Agents, values: &mut Values) -> Result<()> {
        let begun = Instant::now();
        let controller = self.start_controller("controller-again")?;
        let resources = self.runtime.block_on(agents.all_told())?;
        values.push(("agents_again", begun.elapsed().as_secs_f64()));
        values.push(("agents_again_resources", resources as f64));
        values.push(("controller_again_peak", most_resident(controller.id())? / 1e6));
        std::thread::sleep(STARTED);
        values.push(("controller_again", resident(controller.id())? / 1e6));
        Ok(())
    }

    fn start_controller(&self, log: &str) -> Result<Running> {
        let mut command = self.api.command(&binary());
        command.args(["controller", "--kubernetes", "--kubeconfig"]).arg(self.api.kubeconfig());
        command.args(["--namespace", objects::SYSTEM, "--listen", &format!("{ADDRESS}:{CONTROLLER}")]);
        let controller = self.api.run(command, log)?;
        self.await_ready("the controller serves", CONTROLLER_READY);
        Ok(controller)
    }

    /// Connects an agent for each node at once, and waits until they have been told everything.
    fn agents(&self, controller: &Running, values: &mut Values) -> Result<Agents> {
        let agents = self.runtime.block_on(async {
            let roots = objects::roots(&self.client).await?;
            let tokens = objects::tokens(&self.client).await?;
            let begun = Instant::now();
            let mut agents = Agents::connect(SocketAddr::new(ADDRESS.parse()?, CONTROLLER), &roots, tokens)?;
            let resources = agents.all_told().await?;
            ensure!(resources > objects::PODS, "an agent was told of {resources} resources only");
            values.extend([("agents", begun.elapsed().as_secs_f64()), ("agents_lost", agents.lost() as f64)]);
            anyhow::Ok(agents)
        })?;
        std::thread::sleep(STARTED);
        values.push(("controller_500", resident(controller.id())? / 1e6));
        values.push(("controller_500_peak", most_resident(controller.id())? / 1e6));
        Ok(agents)
    }

    /// Changes a pod. Gives the time from the request to the API server until the last agent has heard of it.
    fn change(&mut self, agents: &mut Agents) -> Result<Duration> {
        let number = self.changes * STRIDE % objects::PODS;
        self.changes += 1;
        self.runtime.block_on(async {
            let begun = Instant::now();
            objects::set_unready(&self.client, number).await?;
            Ok(agents.all_heard(&objects::resource_name(number)).await?.duration_since(begun))
        })
    }

    /// Starts a real agent, and starts it again after some changes.
    fn agent(&mut self, agents: &mut Agents, values: &mut Values) -> Result<()> {
        let directory = self.api.path("agent");
        fs::create_dir_all(directory.join("netns"))?;
        let (roots, token) = self
            .runtime
            .block_on(async { anyhow::Ok((objects::roots(&self.client).await?, objects::token(&self.client, NODE).await?)) })?;
        fs::write(directory.join("root.pem"), roots)?;
        fs::write(directory.join("token"), token)?;
        let first = self.start_agent("agent-first", values, ["agent_ready", "agent_resources", "agent_bytes"])?;
        std::thread::sleep(STARTED);
        values.push(("agent", resident(first.id())? / 1e6));
        values.push(("agent_peak", most_resident(first.id())? / 1e6));
        drop(first);
        for _ in 0..MEANWHILE {
            self.change(agents)?;
        }
        let again = self.start_agent("agent-again", values, ["again_ready", "again_resources", "again_bytes"])?;
        std::thread::sleep(STARTED);
        values.push(("again", resident(again.id())? / 1e6));
        values.push(("again_peak", most_resident(again.id())? / 1e6));
        Ok(())
    }

    /// Starts the agent, and waits until it knows the mesh. The keys are of the time that this takes, and of what it is sent.
    fn start_agent(&self, log: &str, values: &mut Values, keys: [&'static str; 3]) -> Result<Running> {
        let directory = self.api.path("agent");
        let mut command = self.api.command(&binary());
        command.args(["agent", "--node", &objects::node_name(NODE), "--controller", &format!("https://{ADDRESS}:{CONTROLLER}")]);
        for (flag, file) in [
            ("--root-cert", "root.pem"),
            ("--token-file", "token"),
            ("--netns-dir", "netns"),
            ("--bpf-dir", "bpf"),
            ("--state-dir", "state"),
        ] {
            command.arg(flag).arg(directory.join(file));
        }
        command.arg("--cgroup-root").arg(cgroup::own());
        for (flag, port) in
            [("--metrics-listen", AGENT_METRICS), ("--ready-listen", AGENT_READY), ("--admin-listen", AGENT_ADMIN)]
        {
            command.arg(flag).arg(format!("127.0.0.1:{port}"));
        }
        let begun = Instant::now();
        let agent = self.api.run(command, log)?;
        self.await_ready("the agent knows the mesh", AGENT_READY);
        let [ready, resources, bytes] = keys;
        values.push((ready, begun.elapsed().as_secs_f64()));
        values.push((resources, self.sent("culvert_xds_resources_received_total")?));
        values.push((bytes, self.sent("culvert_xds_received_bytes_total")? / 1e3));
        Ok(agent)
    }

    /// What the controller has sent to the agent, of all types.
    fn sent(&self, name: &str) -> Result<f64> {
        let page = metrics::get(&self.api.namespace, AGENT_METRICS, "/metrics")?;
        let series = page.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        Ok(series.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum())
    }

    fn await_ready(&self, what: &str, port: u16) {
        eventually_within(PATIENCE, what, || {
            interrupt::wanted() || metrics::get(&self.api.namespace, port, "/healthz/ready").is_ok()
        });
    }
}
