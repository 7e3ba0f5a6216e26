//! The store against an issuer in memory, in virtual time: certificates age without anybody waiting.

use std::collections::VecDeque;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::*;
use crate::identity::clock::TestClock;
use crate::identity::test_authority::{TestAuthority, now, seconds};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn a_leased_identity_gets_its_certificate_and_the_roots_that_came_with_it() {
    let world = World::new(HOUR);
    assert!(world.store.bundle().borrow().is_empty());
    let lease = world.store.lease(&id(CART));
    let svid = lease.wait(seconds(5)).await.expect("issued");
    assert_eq!((svid.id.to_string(), svid.generation), (CART.to_owned(), 1));
    assert_eq!(world.store.bundle().borrow().roots.len(), 1);
    assert_eq!(world.store.current(&id(CART)).expect("current").serial, svid.serial);
    assert!(world.store.current(&id("spiffe://cluster.local/ns/shop/sa/other")).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_around_half_its_life() {
    let world = World::new(HOUR);
    let lease = world.store.lease(&id(CART));
    let first = lease.wait(seconds(5)).await.expect("issued");
    let start = Instant::now();
    let mut changes = world.store.changes();
    changes.changed().await.expect("renewed");
    let share = start.elapsed().as_secs_f64() / HOUR.as_secs_f64();
    assert!((0.39..=0.61).contains(&share), "renewed after {share} of its life");
    let second = lease.current().expect("current");
    assert_ne!(first.serial, second.serial);
    assert_eq!(second.generation, 2);
}

#[tokio::test(start_paused = true)]
async fn certificates_of_a_few_seconds_never_lapse() {
    let world = World::new(seconds(5));
    let lease = world.store.lease(&id(CART));
    lease.wait(seconds(5)).await.expect("issued");
    for _ in 0..600 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(lease.current().is_some());
    }
    assert!(lease.current().expect("current").generation >= 15);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_cannot_be_renewed_is_used_until_it_expires_and_no_longer() {
    let world = World::new(HOUR);
    let lease = world.store.lease(&id(CART));
    let svid = lease.wait(seconds(5)).await.expect("issued");
    world.issuer.answer(Answer::Unreachable);
    tokio::time::sleep(HOUR - seconds(10)).await;
    assert_eq!(lease.current().expect("still good").serial, svid.serial);
    assert!(world.store.list()[0].failures > 10);
    tokio::time::sleep(seconds(15)).await;
    assert!(lease.current().is_none() && world.store.current(&id(CART)).is_none());
    let error = lease.wait(seconds(1)).await.expect_err("expired");
    assert!(matches!(&error, SvidError::Expired { cause, .. } if cause.contains("no route")), "{error}");
    world.issuer.answer(Answer::Sign);
    lease.wait(seconds(2)).await.expect("whoever waits is served soon after the issuer is back");
}

#[tokio::test(start_paused = true)]
async fn attempts_back_off_while_nobody_waits_and_hasten_for_those_who_do() {
    let world = World::new(HOUR);
    world.issuer.answer(Answer::Unreachable);
    let lease = world.store.lease(&id(CART));
    tokio::time::sleep(seconds(600)).await;
    let idle = world.issuer.asked();
    assert!((20..=60).contains(&idle), "{idle} attempts in ten minutes");
    lease.wait(seconds(10)).await.expect_err("unreachable");
    let hastened = world.issuer.asked() - idle;
    assert!((8..=25).contains(&hastened), "{hastened} attempts in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn a_retry_asks_again_at_once() {
    let world = World::new(HOUR);
    world.issuer.answer(Answer::Unreachable);
    let lease = world.store.lease(&id(CART));
    tokio::time::sleep(seconds(600)).await;
    world.issuer.answer(Answer::Sign);
    let start = Instant::now();
    world.store.retry();
    world.store.changes().wait_for(|generation| *generation > 0).await.expect("issued");
    assert!(start.elapsed() < Duration::from_millis(50) && lease.current().is_some());
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_vain_is_told_why() {
    let world = World::new(HOUR);
    world.issuer.answer(Answer::Refuse);
    let error = world.store.wait(&id(CART), seconds(1)).await.expect_err("refused");
    assert_eq!(error.to_string(), "the controller refused: the workload runs on another node");
    world.issuer.answer(Answer::Unreachable);
    let error = world.store.wait(&id(CART), seconds(1)).await.expect_err("unreachable");
    assert_eq!(error.to_string(), "the controller cannot be reached: no route");
    world.issuer.answer(Answer::OtherWorkload);
    let error = world.store.wait(&id(CART), seconds(1)).await.expect_err("unusable");
    assert!(matches!(error, SvidError::Unusable(_)) && error.to_string().contains(CART));
    world.issuer.answer(Answer::Silence);
    let error = world.store.wait(&id(CART), seconds(1)).await.expect_err("no answer");
    assert_eq!(error, SvidError::Pending { waited: seconds(1) });
}

#[tokio::test(start_paused = true)]
async fn the_last_lease_to_go_takes_the_certificate_with_it() {
    let world = World::new(HOUR);
    let (one, other) = (world.store.lease(&id(CART)), world.store.lease(&id(CART)));
    one.wait(seconds(5)).await.expect("issued");
    drop(one);
    assert!(world.store.current(&id(CART)).is_some());
    drop(other);
    assert!(world.store.current(&id(CART)).is_none());
    assert!(world.store.list().is_empty() && world.store.bundle().borrow().is_empty());
}

#[tokio::test(start_paused = true)]
async fn sixteen_requests_run_at_a_time_and_those_waited_for_last_go_first() {
    let world = World::new(HOUR);
    world.issuer.answer(Answer::Silence);
    let name = |number: usize| id(&format!("spiffe://cluster.local/ns/shop/sa/w{number:02}"));
    let leases: Vec<_> = (0..40).map(|number| world.store.lease(&name(number))).collect();
    tokio::time::sleep(seconds(1)).await;
    assert_eq!(world.issuer.asked(), 16);
    let early = leases[30].wait(HOUR);
    let late = leases[35].wait(HOUR);
    let mut both = std::pin::pin!(async { tokio::join!(early, late) });
    assert!(both.as_mut().now_or_never().is_none(), "both wait");
    world.issuer.order.lock().expect("no panic").clear();
    world.issuer.answer(Answer::Sign);
    let (early, late) = both.await;
    assert!(early.is_ok() && late.is_ok());
    let order = world.issuer.order.lock().expect("no panic").iter().take(2).cloned().collect::<Vec<_>>();
    assert_eq!(order, [name(35), name(30)]);
}

#[tokio::test(start_paused = true)]
async fn roots_from_the_file_are_trusted_beside_the_answered_ones_and_followed() {
    let world = World::new(HOUR);
    let lease = world.store.lease(&id(CART));
    lease.wait(seconds(5)).await.expect("issued");
    let mut bundle = world.store.bundle();
    bundle.mark_unchanged();
    let next = TestAuthority::new("next");
    std::fs::write(&world.root_cert, next.root_pem()).expect("written");
    bundle.changed().await.expect("changed");
    assert_eq!(bundle.borrow_and_update().roots.len(), 2);
    std::fs::write(&world.root_cert, "damaged").expect("written");
    tokio::time::sleep(seconds(60)).await;
    assert!(!bundle.has_changed().expect("open"), "a damaged file takes no root away");
}

fn id(text: &str) -> SpiffeId {
    text.parse().expect("a legal id")
}

struct World {
    store: SvidStore,
    issuer: Arc<FakeIssuer>,
    root_cert: PathBuf,
    _directory: tempfile::TempDir,
}

impl World {
    fn new(life: Duration) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let root_cert = directory.path().join("root-cert.pem");
        let clock = Arc::new(TestClock::starting_at(now()));
        let issuer = Arc::new(FakeIssuer {
            authority: TestAuthority::new("root"),
            clock: Arc::clone(&clock) as Arc<dyn Clock>,
            life,
            answer: Mutex::new(Answer::Sign),
            order: Mutex::default(),
            asked: Semaphore::new(0),
        });
        let config = StoreConfig { root_cert: root_cert.clone() };
        let store = SvidStore::start(config, Arc::clone(&issuer) as Arc<dyn Issuer>, clock);
        Self { store, issuer, root_cert, _directory: directory }
    }
}

#[derive(Clone, Copy)]
enum Answer {
    Sign,
    OtherWorkload,
    Refuse,
    Unreachable,
    Silence,
}

struct FakeIssuer {
    authority: TestAuthority,
    clock: Arc<dyn Clock>,
    life: Duration,
    answer: Mutex<Answer>,
    order: Mutex<VecDeque<SpiffeId>>,
    asked: Semaphore,
}

impl FakeIssuer {
    fn answer(&self, answer: Answer) {
        *self.answer.lock().expect("no panic") = answer;
    }

    fn asked(&self) -> usize {
        self.asked.available_permits()
    }
}

impl Issuer for FakeIssuer {
    fn issue(&self, id: SpiffeId, csr: String) -> BoxFuture<'static, Result<Vec<String>, IssueError>> {
        self.asked.add_permits(1);
        self.order.lock().expect("no panic").push_back(id);
        // Whole seconds, as in certificates, and a little before the present, as authorities do.
        let begin = self.clock.now() - seconds(1);
        let result = match *self.answer.lock().expect("no panic") {
            Answer::Sign => Ok(self.authority.sign(&csr, begin, begin + seconds(1) + self.life)),
            Answer::OtherWorkload => {
                let issued = self.authority.leaf("spiffe://cluster.local/ns/shop/sa/other").issue();
                Ok(issued.answer(&self.authority))
            }
            Answer::Refuse => Err(IssueError::Refused { message: "the workload runs on another node".into() }),
            Answer::Unreachable => Err(IssueError::Unreachable { cause: "no route".into() }),
            Answer::Silence => return Box::pin(std::future::pending()),
        };
        Box::pin(std::future::ready(result))
    }
}
