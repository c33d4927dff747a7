"""Queue, policy and run-time model together in virtual time: Poisson arrivals with deadlines, up to ten times capacity.

Each world is a queue with its instances, the clock, and the two things that the I/O thread does: it pushes what arrives
and takes back what has expired. Arrivals, noise and stalls come from a seed; nothing else is random.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from server import _native as native
from server.settings import BatchSettings, QueuePolicySettings

US = 1_000
MS = 1_000_000

LARGEST = 64


@dataclass(frozen=True)
class Model:
    """A batch of b rows takes beta + alpha * b. Callers wait for `deadline_ns`.

    With `stall_ns`, something else takes the core now and then: on average once in `stall_every_ns` of running.
    """

    name: str
    alpha_ns: int
    beta_ns: int
    deadline_ns: int
    noise: float = 0.0  # standard deviation of the run time's logarithm
    stall_ns: int = 0
    stall_every_ns: int = 0

    def run_ns(self, rows: int, chance: random.Random) -> int:
        usual_ns = self.beta_ns + self.alpha_ns * rows
        if self.noise:
            usual_ns = int(usual_ns * math.exp(chance.gauss(0, self.noise)))
        is_stalled = self.stall_ns > 0 and chance.random() < usual_ns / self.stall_every_ns
        return usual_ns + (self.stall_ns if is_stalled else 0)

    def capacity(self, instances: int) -> float:
        """Rows per ns that the largest batch which can be sustained within the deadline carries, stalls included."""
        times = {rows: self.beta_ns + self.alpha_ns * rows for rows in range(1, LARGEST + 1)}
        best = max(rows / time for rows, time in times.items() if 2 * time <= self.deadline_ns)
        running = self.stall_every_ns / (self.stall_every_ns + self.stall_ns) if self.stall_ns else 1.0
        return instances * best * running


CPU = Model("cpu", alpha_ns=20 * US, beta_ns=60 * US, deadline_ns=5 * MS)
GPU = Model("gpu", alpha_ns=50 * US, beta_ns=MS, deadline_ns=10 * MS)


@dataclass
class World:
    """Runs `model` on `instances` under a load that is a multiple of their capacity."""

    model: Model
    instances: int
    load: float
    seed: int = 1
    batches: int = 300  # of the largest size that could run in the time that counts
    knows_deadlines: bool = True  # False: FIFO without any dropping, callers just hang up
    settings: BatchSettings = field(default_factory=lambda: BatchSettings(max_batch_rows=LARGEST))

    answered: int = 0  # in time
    late: int = 0
    counted: int = 0  # arrivals whose outcome counts
    ends: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    arrived: set[int] = field(default_factory=set)
    most_waiting: int = 0
    longest_wait_ns: int = 0  # in the queue, of those that ran
    waits_ns: list[int] = field(default_factory=list)  # of those answered in time, from arrival to answer

    def run(self) -> World:
        self.chance = random.Random(self.seed)
        self.queue = native.BatchQueue(self.settings, self.instances)
        self.due_ns: dict[int, int] = {}
        self.events: list[tuple[int, int, str, int]] = []  # time, tie-break, what, whom
        self.order = 0
        self.batch: list[list[int]] = [[] for _ in range(self.instances)]
        self.took_ns = [0] * self.instances
        capacity = self.model.capacity(self.instances)
        length_ns = int(self.batches * LARGEST / capacity)
        # Counted is what arrives between warm-up and the end; the load goes on until all of that has been decided.
        self.from_ns = 1_000 * MS + int(150 * LARGEST / capacity)
        self.until_ns = self.from_ns + length_ns
        end_ns = self.until_ns + self.model.deadline_ns
        now_ns = 1_000 * MS
        self.mean_gap_ns = 1 / (capacity * self.load)
        self.schedule(now_ns, "arrival", 0)
        while self.events:
            now_ns, _, what, whom = heapq.heappop(self.events)
            if what == "arrival":
                self.arrive(now_ns)
                if now_ns < end_ns:
                    self.schedule(now_ns + max(1, int(self.chance.expovariate(1 / self.mean_gap_ns))), "arrival", 0)
            elif what == "expiry":
                self.expire(now_ns, whom)
            else:
                self.finish(now_ns, whom)
            self.start(now_ns)
        self.check()
        return self

    def schedule(self, at_ns: int, what: str, whom: int) -> None:
        self.order += 1
        heapq.heappush(self.events, (at_ns, self.order, what, whom))

    def counts(self, request_id: int) -> bool:
        return self.from_ns <= self.due_ns[request_id] - self.model.deadline_ns < self.until_ns

    def arrive(self, now_ns: int) -> None:
        due_ns = now_ns + self.model.deadline_ns
        arrival = native.Arrival(due_ns=due_ns) if self.knows_deadlines else native.Arrival()
        (pushed,) = self.queue.push([arrival], now_ns)
        self.arrived.add(pushed.id)
        self.due_ns[pushed.id] = due_ns
        self.counted += self.counts(pushed.id)
        if pushed.reason != "OK":
            self.end(pushed.id, pushed.reason)
        elif pushed.expires_ns != native.NEVER:
            self.schedule(pushed.expires_ns, "expiry", pushed.id)

    def expire(self, now_ns: int, request_id: int) -> None:
        if self.ends[request_id] or any(request_id in batch for batch in self.batch):
            return
        removed, _ = self.queue.remove(request_id)
        assert removed
        self.end(request_id, "EXPIRED")

    def start(self, now_ns: int) -> None:
        for instance in range(self.instances):
            if self.batch[instance]:
                continue
            taken = self.queue.try_take(instance, now_ns)
            for request_id, reason in taken.dropped:
                self.end(request_id, reason)
            if taken.ids:
                assert taken.rows <= LARGEST
                self.batch[instance] = list(taken.ids)
                arrived_ns = [self.due_ns[request_id] - self.model.deadline_ns for request_id in taken.ids]
                self.longest_wait_ns = max(self.longest_wait_ns, now_ns - min(arrived_ns))
                self.took_ns[instance] = self.model.run_ns(taken.rows, self.chance)
                self.schedule(now_ns + self.took_ns[instance], "finish", instance)

    def finish(self, now_ns: int, instance: int) -> None:
        self.queue.finished(instance, self.took_ns[instance], now_ns)
        for request_id in self.batch[instance]:
            self.end(request_id, "RAN")
            if not self.counts(request_id):
                continue
            if now_ns <= self.due_ns[request_id]:
                self.answered += 1
                self.waits_ns.append(now_ns - self.due_ns[request_id] + self.model.deadline_ns)
            else:
                self.late += 1
        self.batch[instance] = []
        self.most_waiting = max(self.most_waiting, int(str(self.queue.view()["waiting"])))

    def end(self, request_id: int, reason: str) -> None:
        self.ends[request_id] += 1
        self.reasons[reason] += 1

    def check(self) -> None:
        """Nothing is lost and nothing ends twice, in any world."""
        assert self.ends.keys() == self.arrived
        assert set(self.ends.values()) == {1}
        assert self.queue.view()["waiting"] == 0

    @property
    def goodput(self) -> float:
        """Answers in time, as a share of what the instances can carry."""
        return self.answered / ((self.until_ns - self.from_ns) * self.model.capacity(self.instances))

    @property
    def share_in_time(self) -> float:
        return self.answered / self.counted

    def p99_ns(self) -> int:
        return sorted(self.waits_ns)[len(self.waits_ns) * 99 // 100]


each_world = pytest.mark.parametrize(
    ("model", "instances"),
    [pytest.param(model, instances, id=f"{model.name}-{instances}") for model in (CPU, GPU) for instances in (1, 2)],
)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
@each_world
def test_below_capacity_everybody_is_answered_in_time(model: Model, instances: int, load: float) -> None:
    world = World(model, instances, load).run()
    assert world.share_in_time == 1.0


@pytest.mark.parametrize("load", [1.2, 2.0, 3.0, 10.0])
@each_world
def test_above_capacity_the_instances_do_nothing_in_vain(model: Model, instances: int, load: float) -> None:
    world = World(model, instances, load, batches=150).run()
    assert world.goodput >= 0.98
    assert world.late == 0


@pytest.mark.parametrize("load", [1.2, 2.0, 10.0])
@each_world
def test_without_deadlines_to_go_by_the_same_queue_answers_too_late(model: Model, instances: int, load: float) -> None:
    # What the tests above would show if dropping and refusing did nothing.
    world = World(model, instances, load, batches=150, knows_deadlines=False).run()
    assert world.goodput < 0.5


@each_world
def test_close_to_capacity_few_are_late(model: Model, instances: int) -> None:
    world = World(model, instances, 1.0).run()
    assert world.goodput >= 0.95
    world = World(model, instances, 1.05).run()
    assert world.goodput >= 0.97


@each_world
def test_light_load_pays_nothing_for_batching(model: Model, instances: int) -> None:
    # At a tenth of the capacity most requests find an idle instance; one that does not waits for one run.
    world = World(model, instances, 0.1).run()
    few_rows_ns = model.beta_ns + model.alpha_ns * 8
    assert world.p99_ns() <= 2 * few_rows_ns


@each_world
def test_a_queue_is_bounded_however_much_comes(model: Model, instances: int) -> None:
    settings = BatchSettings(max_batch_rows=LARGEST, default_policy=QueuePolicySettings(max_queue_size=200))
    world = World(model, instances, 10.0, settings=settings, batches=100).run()
    assert world.most_waiting <= 200
    assert world.reasons["QUEUE_FULL"] > 0


@each_world
def test_most_who_cannot_be_served_are_told_at_once(model: Model, instances: int) -> None:
    world = World(model, instances, 3.0).run()
    refused = world.reasons["TOO_LATE"] + world.reasons["QUEUE_FULL"]
    assert refused >= 0.8 * (len(world.arrived) - world.reasons["RAN"])


@each_world
def test_a_noisy_run_time_costs_little(model: Model, instances: int) -> None:
    noisy = replace(model, noise=0.2)
    assert World(noisy, instances, 0.7).run().share_in_time >= 0.99
    for load in (1.2, 2.0, 10.0):
        assert World(noisy, instances, load, batches=150).run().goodput >= 0.9


@each_world
def test_stalls_longer_than_any_deadline_cost_little_more_than_their_own_time(model: Model, instances: int) -> None:
    # Enough of them that the 99th percentile of a full batch is a stall: by that alone nobody could be served.
    stalled = replace(model, stall_ns=2 * model.deadline_ns, stall_every_ns=25 * model.deadline_ns)
    for load in (2.0, 10.0):
        assert World(stalled, instances, load, batches=400).run().goodput >= 0.85


@pytest.mark.parametrize("load", [0.7, 3.0])
@each_world
def test_a_default_timeout_alone_bounds_the_wait(model: Model, instances: int, load: float) -> None:
    # Callers say nothing of a deadline; the queue may keep nobody for longer than 4 ms.
    policy = QueuePolicySettings(default_timeout_us=4_000)
    settings = BatchSettings(max_batch_rows=LARGEST, default_policy=policy)
    world = World(model, instances, load, settings=settings, knows_deadlines=False, batches=150).run()
    assert world.reasons["RAN"] > 0
    assert world.longest_wait_ns <= 4 * MS


def test_the_same_seed_gives_the_same_world() -> None:
    first, second, other = (World(CPU, 2, 2.0, seed=seed, batches=50).run() for seed in (1, 1, 2))
    assert first.reasons == second.reasons
    assert first.reasons != other.reasons


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.95, 1.2, 2.0, 3.0, 10.0])
@each_world
def test_many_seeds_and_long_worlds_agree(model: Model, instances: int, load: float) -> None:
    for seed in range(10, 13):
        world = World(model, instances, load, seed=seed, batches=1000).run()
        assert world.goodput >= 0.97 * min(load, 1.0)
        assert world.late == 0
