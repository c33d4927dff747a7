"""The batch queue, driven by hand at given times: each knob of the configuration on and off; a model of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server import _native as native
from server.settings import BatchSettings, QueuePolicySettings

US = 1_000
MS = 1_000_000
START = 1_000 * MS

QUEUE_BOUND = 4096  # requests waiting at a level where the configuration says nothing
SHAPE_MODELS = 16  # shapes that have a run-time model
DROPS_PER_TAKE = 256


def a_queue(instances: int = 1, **changes: Any) -> native.BatchQueue:
    return native.BatchQueue(BatchSettings(**({"max_batch_rows": 8} | changes)), instances)


def push(queue: native.BatchQueue, *arrivals: native.Arrival, at: int = START) -> list[int]:
    """Pushes requests that are all accepted; returns their ids."""
    pushed = queue.push(arrivals, at)
    assert [one.reason for one in pushed] == ["OK"] * len(arrivals)
    return [one.id for one in pushed]


def refusal(queue: native.BatchQueue, arrival: native.Arrival, at: int = START) -> native.Pushed:
    (pushed,) = queue.push([arrival], at)
    assert pushed.reason != "OK"
    return pushed


def run(queue: native.BatchQueue, at: int = START, run_ns: int = MS, instance: int = 0) -> list[int]:
    """Takes a batch and finishes it; returns its ids."""
    taken = queue.try_take(instance, at)
    if taken.ids:
        queue.finished(instance, run_ns, at + run_ns)
    return list(taken.ids)


def taught(queue: native.BatchQueue, run_ns: int = MS, rows: tuple[int, ...] = (8,), shape: int = 0) -> int:
    """Lets a queue see enough runs to trust its predictions; returns the time afterwards."""
    now_ns = START - 400 * MS
    for n in range(60):
        push(queue, native.Arrival(rows=rows[n % len(rows)], shape=shape), at=now_ns)
        assert run(queue, now_ns, run_ns)
        now_ns += run_ns
    return now_ns


def policy(**values: Any) -> QueuePolicySettings:
    return QueuePolicySettings(**values)


ONE = native.Arrival()


# -- what shares a batch ----------------------------------------------------------------------------------------------


def test_a_free_instance_takes_what_is_there() -> None:
    queue = a_queue()
    ids = push(queue, ONE, ONE, ONE)
    assert run(queue) == ids


def test_a_batch_has_at_most_max_batch_size_rows() -> None:
    queue = a_queue(max_batch_rows=8)
    ids = push(queue, *[native.Arrival(rows=3)] * 4)
    assert run(queue) == ids[:2]
    assert run(queue) == ids[2:]


def test_nobody_overtakes_a_request_that_does_not_fit() -> None:
    queue = a_queue(max_batch_rows=8)
    ids = push(queue, native.Arrival(rows=5), native.Arrival(rows=5), native.Arrival(rows=1))
    assert run(queue) == ids[:1]
    assert run(queue) == ids[1:]


@pytest.mark.parametrize("rows", [0, 9])
def test_rows_out_of_bounds_are_refused_with_the_bounds(rows: int) -> None:
    refused = refusal(a_queue(max_batch_rows=8), native.Arrival(rows=rows))
    assert refused.reason == "INVALID_TENSOR"
    assert "1 to 8 rows" in refused.message
    assert f"has {rows}" in refused.message


def test_without_dynamic_batching_a_batch_is_one_request() -> None:
    queue = a_queue(dynamic_batching=False)
    ids = push(queue, native.Arrival(rows=2), ONE, ONE)
    assert [run(queue) for _ in ids] == [[one] for one in ids]


def test_without_dynamic_batching_a_delay_holds_nothing() -> None:
    queue = a_queue(dynamic_batching=False, max_queue_delay_us=1_000)
    assert run(queue) == []
    ids = push(queue, ONE)
    assert run(queue) == ids


def test_without_a_batch_dimension_a_batch_is_one_request() -> None:
    queue = a_queue(max_batch_rows=1)
    ids = push(queue, ONE, ONE)
    assert run(queue) == ids[:1]
    assert run(queue) == ids[1:]


def test_different_shapes_never_share_a_batch_and_the_oldest_goes_first() -> None:
    queue = a_queue()
    a1, b1, a2, b2 = push(queue, *(native.Arrival(shape=shape) for shape in (7, 8, 7, 8)))
    assert run(queue) == [a1, a2]
    assert run(queue) == [b1, b2]


def test_more_shapes_than_have_a_model_are_served_all_the_same() -> None:
    queue = a_queue()
    ids = push(queue, *(native.Arrival(shape=n % 100) for n in range(200)))
    for first in range(100):
        assert run(queue, START + first * MS) == [ids[first], ids[first + 100]]
    assert queue.view()["waiting"] == 0


def test_each_shape_has_its_own_run_time_model() -> None:
    queue = a_queue()
    now_ns = taught(queue, run_ns=4 * MS, shape=1)
    busy = push(queue, native.Arrival(rows=8, shape=1), at=now_ns)
    assert queue.try_take(0, now_ns).ids == tuple(busy)
    tight = now_ns + 2 * MS
    assert refusal(queue, native.Arrival(shape=1, due_ns=tight), now_ns).reason == "TOO_LATE"
    push(queue, native.Arrival(shape=2, due_ns=tight), at=now_ns)


def test_the_model_of_the_shape_that_ran_longest_ago_goes() -> None:
    queue = a_queue()
    now_ns = taught(queue, run_ns=4 * MS, shape=1)
    for shape in range(2, SHAPE_MODELS + 2):
        push(queue, native.Arrival(shape=shape), at=now_ns)
        run(queue, now_ns)
    push(queue, native.Arrival(rows=8, shape=1), at=now_ns)
    queue.try_take(0, now_ns)
    push(queue, native.Arrival(shape=1, due_ns=now_ns + 2 * MS), at=now_ns)  # nothing is known of it any more


def test_a_model_that_is_used_stays_whatever_else_comes() -> None:
    queue = a_queue()
    now_ns = taught(queue, run_ns=4 * MS, shape=1)
    for shape in range(2, 40):
        for one in (shape, 1):
            push(queue, native.Arrival(shape=one), at=now_ns)
            run(queue, now_ns, 4 * MS)
    push(queue, native.Arrival(rows=8, shape=1), at=now_ns)
    queue.try_take(0, now_ns)
    assert refusal(queue, native.Arrival(shape=1, due_ns=now_ns + 2 * MS), now_ns).reason == "TOO_LATE"


# -- holding ----------------------------------------------------------------------------------------------------------


def test_at_delay_0_nothing_is_held() -> None:
    queue = a_queue(preferred_batch_sizes=(4,))
    ids = push(queue, ONE)
    assert run(queue) == ids


def test_a_delay_holds_for_company_and_not_longer() -> None:
    queue = a_queue(max_queue_delay_us=500)
    first = push(queue, ONE)
    held = queue.try_take(0, START + 100 * US)
    assert (held.ids, held.again_ns) == ((), START + 500 * US)
    second = push(queue, ONE, at=START + 200 * US)
    assert queue.try_take(0, START + 200 * US).again_ns == START + 500 * US
    assert run(queue, START + 500 * US) == first + second


def test_a_full_batch_ends_a_hold() -> None:
    queue = a_queue(max_queue_delay_us=500)
    push(queue, native.Arrival(rows=7))
    assert run(queue) == []
    push(queue, ONE)
    assert len(run(queue)) == 2


def test_a_preferred_size_ends_a_hold_and_is_not_a_limit() -> None:
    queue = a_queue(max_queue_delay_us=500, preferred_batch_sizes=(6, 4))
    push(queue, *[ONE] * 3)
    assert run(queue) == []
    push(queue, ONE, ONE)
    assert len(run(queue)) == 5


def test_another_shape_that_waits_ends_a_hold() -> None:
    queue = a_queue(max_queue_delay_us=500)
    ids = push(queue, ONE)
    assert run(queue) == []
    push(queue, native.Arrival(shape=1))
    assert run(queue) == ids


@pytest.mark.parametrize("arrival", [native.Arrival(timeout_us=300), native.Arrival(due_ns=START + 300 * US)])
def test_a_deadline_ends_a_hold(arrival: native.Arrival) -> None:
    queue = a_queue(max_queue_delay_us=500)
    push(queue, arrival)
    assert queue.try_take(0, START).again_ns == START + 300 * US - native.SLACK_NS


def test_a_queue_timeout_ends_a_hold() -> None:
    queue = a_queue(max_queue_delay_us=500, default_policy=policy(default_timeout_us=300))
    push(queue, ONE)
    assert queue.try_take(0, START).again_ns == START + 300 * US


def test_a_request_that_was_set_back_can_be_held_for_company_like_others() -> None:
    queue = a_queue(max_queue_delay_us=5_000, default_policy=policy(delay=True, default_timeout_us=1_000))
    push(queue, ONE)
    assert queue.try_take(0, START + MS).again_ns == START + 5 * MS


def test_once_run_times_are_known_a_hold_must_pay() -> None:
    def held(gap_ns: int, neighbour: bool) -> bool:
        other = a_queue()
        queue = native.BatchQueue(BatchSettings(max_batch_rows=8, max_queue_delay_us=5_000), beside=other)
        now_ns = START
        for n in range(60):  # run times of 1 ms and 0.1 ms a row: the fixed part is 1 ms
            rows = (1, 2, 4, 8)[n % 4]
            push(queue, native.Arrival(rows=rows), at=now_ns)
            run(queue, now_ns + 5 * MS, MS + rows * MS // 10)
            now_ns += gap_ns
        if neighbour:
            push(other, ONE)
        push(queue, ONE, at=now_ns)
        return run(queue, now_ns) == []

    assert held(gap_ns=MS // 2, neighbour=False)  # the next one comes sooner than a run's fixed part is over
    assert not held(gap_ns=20 * MS, neighbour=False)
    assert held(gap_ns=20 * MS, neighbour=True)  # another queue can use the core


# -- priorities -------------------------------------------------------------------------------------------------------


def test_lower_numbers_are_served_first_and_each_level_in_order_of_arrival() -> None:
    queue = a_queue(max_batch_rows=2, priority_levels=3, default_priority_level=2)
    ids = push(queue, *(native.Arrival(priority=level) for level in (3, 2, 1, 3, 1, 2)))
    assert [run(queue) for _ in range(3)] == [[ids[2], ids[4]], [ids[1], ids[5]], [ids[0], ids[3]]]


def test_priority_0_is_the_default_level() -> None:
    queue = a_queue(max_batch_rows=1, priority_levels=3, default_priority_level=2)
    ids = push(queue, native.Arrival(priority=3), native.Arrival(priority=0), native.Arrival(priority=1))
    assert [run(queue)[0] for _ in ids] == [ids[2], ids[1], ids[0]]


def test_a_level_that_does_not_exist_is_refused() -> None:
    refused = refusal(a_queue(priority_levels=3, default_priority_level=1), native.Arrival(priority=4))
    assert refused.reason == "INVALID_TENSOR"
    assert refused.message == "priority 4 does not exist; the model has 1 (highest) to 3"


def test_without_levels_priorities_mean_nothing() -> None:
    queue = a_queue(max_batch_rows=1)
    ids = push(queue, native.Arrival(priority=9), native.Arrival(priority=1))
    assert [run(queue)[0] for _ in ids] == ids


def test_who_comes_with_an_older_clock_does_not_get_ahead() -> None:
    # I/O threads read the clock before they wait for the lock: what comes later may carry an earlier time.
    queue = a_queue(priority_levels=2, default_priority_level=1, priority_aging_us=100)
    (other,) = push(queue, native.Arrival(shape=1), at=START + 20 * US)
    (high,) = push(queue, native.Arrival(priority=1), at=START)
    (low,) = push(queue, native.Arrival(priority=2), at=START + 10 * US)
    assert run(queue, START + 300 * US) == [other]
    assert run(queue, START + 300 * US) == [high, low]


@pytest.mark.parametrize(("aging_us", "served_after"), [(100_000, 100), (10_000, 10), (0, None)])
def test_a_low_level_is_served_at_last_unless_aging_is_off(aging_us: int, served_after: int | None) -> None:
    queue = a_queue(max_batch_rows=1, priority_levels=2, default_priority_level=1, priority_aging_us=aging_us)
    (low,) = push(queue, native.Arrival(priority=2))
    for n in range(500):  # one high request each millisecond, as many as the instance can run
        now_ns = START + n * MS
        push(queue, native.Arrival(priority=1), at=now_ns)
        if run(queue, now_ns) == [low]:
            assert n == served_after
            return
    assert served_after is None


def test_the_rest_of_a_batch_is_filled_from_lower_levels() -> None:
    queue = a_queue(max_batch_rows=3, priority_levels=2, default_priority_level=1)
    ids = push(queue, native.Arrival(priority=2), native.Arrival(priority=2), native.Arrival(priority=1))
    assert run(queue) == [ids[2], ids[0], ids[1]]


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    queue = a_queue(default_policy=policy(max_queue_size=3))
    push(queue, ONE, ONE, ONE)
    refused = refusal(queue, ONE)
    assert refused.reason == "QUEUE_FULL"
    assert refused.pushback_ms > 0
    assert refused.message
    run(queue)
    push(queue, ONE)


def test_a_queue_without_a_size_is_bounded_all_the_same() -> None:
    queue = a_queue(max_batch_rows=64)
    pushed = queue.push([ONE] * (QUEUE_BOUND + 10), START)
    assert Counter(one.reason for one in pushed) == {"OK": QUEUE_BOUND, "QUEUE_FULL": 10}
    assert queue.view()["waiting"] == QUEUE_BOUND


def test_a_level_has_its_own_bound() -> None:
    queue = a_queue(
        priority_levels=2,
        default_priority_level=2,
        default_policy=policy(max_queue_size=5),
        level_policies={1: policy(max_queue_size=2)},
    )
    arrivals = [native.Arrival(priority=1)] * 3 + [native.Arrival(priority=2)] * 6
    reasons = [one.reason for one in queue.push(arrivals, START)]
    assert reasons == ["OK"] * 2 + ["QUEUE_FULL"] + ["OK"] * 5 + ["QUEUE_FULL"]


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_what_expired_in_the_queue_is_dropped_and_never_run() -> None:
    queue = a_queue()
    late, fine = push(queue, native.Arrival(due_ns=START + MS), ONE)
    taken = queue.try_take(0, START + MS)
    assert (taken.ids, taken.dropped) == ((fine,), ((late, "DEADLINE_PASSED"),))


def test_what_has_expired_already_is_refused() -> None:
    assert refusal(a_queue(), native.Arrival(due_ns=START)).reason == "DEADLINE_PASSED"


def test_the_deadline_is_the_earliest_of_grpc_timeout_and_timeout() -> None:
    queue = a_queue()
    arrivals = [native.Arrival(due_ns=START + 5 * MS, timeout_us=timeout_us) for timeout_us in (0, 2_000, 9_000)]
    assert [one.expires_ns - START for one in queue.push(arrivals, START)] == [5 * MS, 2 * MS, 5 * MS]


def test_a_default_timeout_limits_the_wait_and_not_the_run() -> None:
    queue = a_queue(default_policy=policy(default_timeout_us=2_000))
    now_ns = taught(queue, run_ns=50 * MS)
    (one,) = queue.push([ONE], now_ns)
    assert one.expires_ns == now_ns + 2 * MS
    assert run(queue, now_ns + 2 * MS - 1) == [one.id]
    (late,) = push(queue, ONE, at=now_ns)
    assert queue.try_take(0, now_ns + 2 * MS).dropped == ((late, "DEADLINE_PASSED"),)


def test_without_a_default_timeout_a_request_waits_for_ever() -> None:
    queue = a_queue()
    (one,) = queue.push([ONE], START)
    assert one.expires_ns == native.NEVER
    assert run(queue, START + 10**15) == [one.id]


def test_delay_sets_a_timed_out_request_behind_the_others_of_its_level() -> None:
    queue = a_queue(max_batch_rows=1, default_policy=policy(delay=True, default_timeout_us=1_000))
    first, second = push(queue, native.Arrival(due_ns=START + 50 * MS), ONE)
    third, fourth = push(queue, ONE, ONE, at=START + MS)
    assert [run(queue, START + MS)[0] for _ in range(4)] == [third, fourth, first, second]


def test_delay_keeps_a_request_until_the_callers_own_deadline() -> None:
    queue = a_queue(max_batch_rows=1, default_policy=policy(delay=True, default_timeout_us=1_000))
    (delayed,) = queue.push([native.Arrival(due_ns=START + 50 * MS)], START)
    assert delayed.expires_ns == START + 50 * MS
    (other,) = push(queue, ONE, at=START + MS)
    assert run(queue, START + MS) == [other]
    taken = queue.try_take(0, START + 50 * MS)
    assert taken.dropped == ((delayed.id, "DEADLINE_PASSED"),)


def test_a_delayed_request_ages_like_all_others() -> None:
    queue = a_queue(max_batch_rows=1, default_policy=policy(delay=True, default_timeout_us=1_000))
    (delayed,) = push(queue, ONE)
    for n in range(1, 300):
        now_ns = START + n * MS
        push(queue, ONE, at=now_ns)
        if run(queue, now_ns) == [delayed]:
            assert n == 101  # set back after 1 ms, lifted after 100 ms more
            return
    pytest.fail("it starves")


def test_with_an_override_timeout_says_when_a_request_is_set_back() -> None:
    def order(override: bool) -> tuple[list[int], int]:
        delay = policy(delay=True, default_timeout_us=50_000, allow_timeout_override=override)
        queue = a_queue(max_batch_rows=1, default_policy=delay)
        (first,) = queue.push([native.Arrival(timeout_us=1_000)], START)
        push(queue, ONE, at=START + MS)
        served = [one for _ in range(2) for one in run(queue, START + 2 * MS)]
        return [one - first.id for one in served], first.expires_ns

    assert order(override=True) == ([1, 0], native.NEVER)
    # Without, `timeout` is the caller's deadline.
    assert order(override=False) == ([1], START + MS)


def test_an_override_cannot_lengthen_the_default_timeout() -> None:
    queue = a_queue(default_policy=policy(default_timeout_us=1_000, allow_timeout_override=True))
    (one,) = queue.push([native.Arrival(timeout_us=9_000)], START)
    assert one.expires_ns == START + MS


def test_a_level_has_its_own_timeout() -> None:
    queue = a_queue(
        priority_levels=2,
        default_priority_level=1,
        default_policy=policy(default_timeout_us=1_000),
        level_policies={2: policy(default_timeout_us=3_000)},
    )
    high, low = queue.push([native.Arrival(priority=1), native.Arrival(priority=2)], START)
    assert (high.expires_ns, low.expires_ns) == (START + MS, START + 3 * MS)
    taken = queue.try_take(0, START + 2 * MS)
    assert (taken.ids, taken.dropped) == ((low.id,), ((high.id, "DEADLINE_PASSED"),))


def test_nothing_is_refused_or_dropped_for_its_prediction_before_fifty_runs() -> None:
    queue = a_queue()
    now_ns = START
    for n in range(native.TRUSTED_RUNS + 1):
        (one,) = queue.push([native.Arrival(due_ns=now_ns + 2 * MS)], now_ns)
        taken = queue.try_take(0, now_ns)
        trusted = n >= native.TRUSTED_RUNS
        assert (taken.ids, taken.dropped) == (((), ((one.id, "DEADLINE_PASSED"),)) if trusted else ((one.id,), ()))
        if taken.ids:
            queue.finished(0, 50 * MS, now_ns)


def test_who_cannot_make_it_behind_what_waits_is_refused_at_once() -> None:
    queue = a_queue()
    now_ns = taught(queue, run_ns=MS)
    push(queue, *[native.Arrival(rows=8)] * 3, at=now_ns)
    queue.try_take(0, now_ns)
    # 1 ms for the running batch, 2 ms for those ahead, 1 ms for itself, 50 us for the wire.
    end_ns = now_ns + 4 * MS + native.SLACK_NS
    refused = refusal(queue, native.Arrival(rows=8, due_ns=end_ns - 1), now_ns)
    assert (refused.reason, refused.pushback_ms) == ("TOO_LATE", 1)
    push(queue, native.Arrival(rows=8, due_ns=end_ns), at=now_ns)


@pytest.mark.parametrize("refused", [False, True])
def test_a_late_head_shrinks_the_batch_unless_others_are_being_refused(refused: bool) -> None:
    queue = a_queue()
    now_ns = taught(queue, run_ns=2 * MS)
    for _ in range(60):  # one row takes 1 ms, eight take 2 ms: the knee is beyond 4 rows
        push(queue, ONE, at=now_ns)
        run(queue, now_ns, MS)
        now_ns += 100 * MS
    push(queue, native.Arrival(rows=8), at=now_ns)
    queue.try_take(0, now_ns)
    if refused:
        assert refusal(queue, native.Arrival(due_ns=now_ns + MS), now_ns).reason == "TOO_LATE"
    queue.finished(0, 2 * MS, now_ns + 2 * MS)
    now_ns += 2 * MS
    ids = push(queue, native.Arrival(due_ns=now_ns + 2 * MS), *[ONE] * 8, at=now_ns)
    taken = queue.try_take(0, now_ns)
    if refused:
        assert (list(taken.ids), list(taken.dropped)) == (ids[1:], [(ids[0], "DEADLINE_PASSED")])
    else:
        assert list(taken.ids) == ids[: len(taken.ids)]
        assert 4 < len(taken.ids) < 8


def test_lower_levels_are_not_ahead_of_a_higher_one() -> None:
    queue = a_queue(priority_levels=2, default_priority_level=2)
    now_ns = taught(queue, run_ns=MS)
    push(queue, *[native.Arrival(rows=8, priority=2)] * 10, at=now_ns)
    queue.try_take(0, now_ns)
    due_ns = now_ns + 3 * MS
    assert refusal(queue, native.Arrival(priority=2, due_ns=due_ns), now_ns).reason == "TOO_LATE"
    push(queue, native.Arrival(priority=1, due_ns=due_ns), at=now_ns)


def test_a_target_limits_the_batch() -> None:
    queue = a_queue(slo_us=5_000)
    now_ns = taught(queue, run_ns=2 * MS, rows=(4,))
    for _ in range(60):  # 8 rows take 4 ms, twice that is beyond 5 ms
        push(queue, native.Arrival(rows=8), at=now_ns)
        run(queue, now_ns, 4 * MS)
        now_ns += 100 * MS
    view = queue.view()
    assert (view["cap"], view["l50_ns"]) == (5, (0, 0, 2 * MS, 4 * MS))
    push(queue, *[ONE] * 8, at=now_ns)
    assert len(run(queue, now_ns)) == 5


def test_a_request_larger_than_the_target_allows_runs_alone() -> None:
    queue = a_queue(slo_us=1_000)
    now_ns = taught(queue, run_ns=2 * MS)
    now_ns += 2_000 * MS
    big, small = push(queue, native.Arrival(rows=8), ONE, at=now_ns)
    assert run(queue, now_ns) == [big]
    assert run(queue, now_ns) == [small]


# -- leaving otherwise ------------------------------------------------------------------------------------------------


def test_a_removed_request_is_gone_and_a_running_one_stays() -> None:
    queue = a_queue(max_batch_rows=1)
    first, second = push(queue, ONE, ONE)
    queue.try_take(0, START)
    assert queue.remove(first) == (False, [])
    assert queue.remove(second) == (True, [])
    queue.finished(0, MS, START + MS)
    assert queue.try_take(0, START + MS).again_ns == native.NEVER
    assert queue.view()["waiting"] == 0


def test_a_cancelled_request_is_dropped_and_never_run() -> None:
    queue = a_queue()
    gone, here = push(queue, ONE, ONE)
    queue.cancel(gone)
    taken = queue.try_take(0, START)
    assert (taken.ids, taken.dropped) == ((here,), ((gone, "CANCELLED"),))


def test_dropped_requests_do_not_wait_for_a_held_batch() -> None:
    queue = a_queue(max_queue_delay_us=500)
    gone, held = push(queue, ONE, ONE)
    queue.cancel(gone)
    taken = queue.try_take(0, START)
    assert (taken.ids, taken.dropped, taken.again_ns) == ((), ((gone, "CANCELLED"),), START)
    assert run(queue, START + 500 * US) == [held]


def test_a_flood_of_expired_requests_is_answered_in_pieces() -> None:
    queue = a_queue()
    ids = push(queue, *[native.Arrival(due_ns=START + MS)] * 1000)
    (alive,) = push(queue, ONE, at=START + MS)
    dropped: list[int] = []
    for _ in range(10):
        taken = queue.try_take(0, START + MS)
        assert len(taken.dropped) <= DROPS_PER_TAKE
        dropped += [request_id for request_id, _ in taken.dropped]
        if taken.ids:
            break
    assert (dropped, taken.ids) == (ids, (alive,))


def test_a_closed_queue_refuses_and_drains() -> None:
    queue = a_queue(max_queue_delay_us=1_000_000, max_batch_rows=2)
    ids = push(queue, ONE, ONE, ONE)
    queue.close()
    refused = refusal(queue, ONE)
    assert refused.reason == "VERSION_NOT_READY"
    assert "unloaded" in refused.message
    assert [run(queue), run(queue)] == [ids[:2], ids[2:]]
    assert queue.try_take(0, START).again_ns == native.NEVER


def test_the_view_says_what_waits_and_what_runs() -> None:
    queue = a_queue(instances=2)
    push(queue, native.Arrival(rows=5), native.Arrival(rows=4), native.Arrival(rows=2))
    queue.try_take(0, START)
    assert queue.view() == {
        "waiting": 2, "waiting_rows": 6, "running_rows": 5, "knee": 8, "cap": 8, "l50_ns": (0,) * 4, "l99_ns": (0,) * 4
    }  # fmt: skip
    queue.finished(0, 3 * MS, START + 3 * MS)
    view = queue.view()
    assert (view["running_rows"], view["l50_ns"], view["l99_ns"]) == (0, (0, 0, 0, 3 * MS), (0, 0, 0, 3 * MS))


def test_a_failed_batch_teaches_nothing_about_run_times() -> None:
    queue = a_queue()
    push(queue, ONE)
    queue.try_take(0, START)
    queue.finished(0, MS, START + MS, ok=False)
    assert queue.view()["l50_ns"] == (0, 0, 0, 0)


# -- order of answers -------------------------------------------------------------------------------------------------


def test_with_preserve_ordering_answers_leave_in_the_order_of_arrival() -> None:
    queue = a_queue(instances=2, max_batch_rows=2, preserve_ordering=True)
    a, b, c, d = push(queue, *[ONE] * 4)
    assert queue.try_take(0, START).ids == (a, b)
    assert queue.try_take(1, START).ids == (c, d)
    assert queue.release(c) == []
    assert queue.release(d) == []
    assert queue.release(a) == [a]
    assert queue.release(b) == [b, c, d]


def test_without_preserve_ordering_nothing_is_kept() -> None:
    queue = a_queue()
    (one,) = push(queue, ONE)
    queue.try_take(0, START)
    with pytest.raises(RuntimeError, match="preserve_ordering"):
        queue.release(one)


def test_a_removed_request_makes_way_for_finished_ones() -> None:
    queue = a_queue(max_batch_rows=1, preserve_ordering=True, priority_levels=2, default_priority_level=2)
    low, high = push(queue, native.Arrival(priority=2), native.Arrival(priority=1))
    assert queue.try_take(0, START).ids == (high,)
    assert queue.release(high) == []
    assert queue.remove(low) == (True, [high])


def test_a_dropped_request_keeps_its_place_in_the_order() -> None:
    queue = a_queue(instances=2, max_batch_rows=1, preserve_ordering=True)
    first, gone, last = push(queue, ONE, ONE, ONE)
    queue.cancel(gone)
    assert queue.try_take(0, START).ids == (first,)
    taken = queue.try_take(1, START)
    assert (taken.ids, taken.dropped) == ((last,), ((gone, "CANCELLED"),))
    assert queue.release(gone) == []
    assert queue.release(last) == []
    assert queue.release(first) == [first, gone, last]


def test_answers_kept_for_their_turn_are_bounded_too() -> None:
    queue = a_queue(instances=2, max_batch_rows=64, preserve_ordering=True)
    push(queue, native.Arrival(rows=64))
    queue.try_take(0, START)  # takes very long
    kept = 0
    while kept < 2 * QUEUE_BOUND:
        pushed = [one for one in queue.push([ONE] * 64, START) if one.reason == "OK"]
        if not pushed:
            break
        for request_id in queue.try_take(1, START).ids:
            assert queue.release(request_id) == []
            kept += 1
        queue.finished(1, MS, START)
    assert QUEUE_BOUND - 64 <= kept <= QUEUE_BOUND
    assert refusal(queue, ONE).reason == "QUEUE_FULL"


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass
class Waiting:
    id: int
    rows: int
    level: int
    shape: int
    arrived_ns: int
    due_ns: int
    queue_due_ns: int
    cancelled: bool = False
    delayed: bool = False
    listed_ns: int = 0

    @property
    def list(self) -> int:
        return 2 * self.level + self.delayed

    @property
    def half_ns(self) -> int:
        if self.due_ns == native.NEVER:
            return native.NEVER
        return self.arrived_ns + (self.due_ns - self.arrived_ns) // 2


@dataclass
class ShapeModel:
    predictor: native.Predictor
    used: int = 0


@dataclass
class Gap:
    """Time between the rows that arrive, over windows of 10 ms."""

    gap_ns: int = native.NEVER
    since_ns: int = 0
    rows: int = 0

    def note(self, rows: int, now_ns: int) -> None:
        if now_ns - self.since_ns >= 10 * MS:
            if self.rows:
                self.gap_ns = max((now_ns - self.since_ns) // self.rows, 1)
            self.since_ns, self.rows = now_ns, 0
        self.rows += rows


@dataclass
class Running:
    ids: tuple[int, ...]
    rows: int
    shape: int
    ends_ns: int
    probe: bool


@dataclass
class QueueModel:
    """What the queue should do, with plain lists and the bound pure functions."""

    settings: BatchSettings
    instances: int
    lists: dict[int, list[Waiting]] = field(default_factory=dict)
    running: dict[int, Running] = field(default_factory=dict)
    models: dict[int, ShapeModel] = field(default_factory=dict)
    last_start_ns: dict[int, int] = field(default_factory=dict)
    last_refusal_ns: dict[int, int] = field(default_factory=dict)
    gaps: dict[int, Gap] = field(default_factory=dict)
    outstanding: list[int] = field(default_factory=list)  # with preserve_ordering: in order of arrival
    released: set[int] = field(default_factory=set)
    starts: int = 0
    clock_ns: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        levels = max(self.settings.priority_levels, 1)
        self.lists = {index: [] for index in range(2 * levels)}

    @property
    def waiting(self) -> list[Waiting]:
        return [one for index in sorted(self.lists) for one in self.lists[index]]

    def policy(self, level: int) -> QueuePolicySettings:
        if self.settings.priority_levels:
            return self.settings.level_policies.get(level + 1, self.settings.default_policy)
        return self.settings.default_policy

    def prediction(self, shape: int) -> native.Prediction:
        if shape in self.models:
            return self.models[shape].predictor.prediction
        return native.Predictor(self.settings.max_batch_rows).prediction

    def time_of(self, shape: int, rows: int) -> int:
        return self.models[shape].predictor.l50_ns(rows) if shape in self.models else 0

    # -- coming in

    def push(self, arrivals: list[tuple[int, native.Arrival]], now_ns: int) -> list[str]:
        return [self.accept(request_id, arrival, now_ns) for request_id, arrival in arrivals]

    def accept(self, request_id: int, arrival: native.Arrival, now_ns: int) -> str:
        if self.closed:
            return "VERSION_NOT_READY"
        level = 0
        if self.settings.priority_levels:
            level = (arrival.priority or self.settings.default_priority_level) - 1
            if level >= self.settings.priority_levels:
                return "INVALID_TENSOR"
        policy = self.policy(level)
        due_ns, queue_due_ns = arrival.due_ns, native.NEVER
        if policy.default_timeout_us:
            queue_due_ns = now_ns + policy.default_timeout_us * US
        if arrival.timeout_us:
            if policy.delay and policy.allow_timeout_override:
                queue_due_ns = min(queue_due_ns, now_ns + arrival.timeout_us * US)
            else:
                due_ns = min(due_ns, now_ns + arrival.timeout_us * US)
        one = Waiting(
            request_id, arrival.rows, level, arrival.shape, now_ns, due_ns, queue_due_ns, listed_ns=self.tick(now_ns)
        )
        ahead = [other for other in self.waiting if other.shape == one.shape and other.list <= one.list]
        admission = native.admit(
            self.prediction(one.shape),
            now_ns,
            rows=one.rows,
            due_ns=due_ns,
            half_ns=one.half_ns,
            start_by_ns=native.NEVER if policy.delay else queue_due_ns,
            waiting=len([other for other in self.waiting if other.level == level]),
            max_waiting=policy.max_queue_size or QUEUE_BOUND,
            rows_ahead=sum(other.rows for other in ahead),
            requests_ahead=len(ahead),
            free_ns=sorted(
                self.running[one].ends_ns if one in self.running else -native.NEVER for one in range(self.instances)
            ),
            gap_ns=self.gaps.setdefault(one.shape, Gap()).gap_ns,
            max_rows=self.settings.max_batch_rows,
            batching=self.settings.dynamic_batching,
        )
        if admission.reason == "OK":
            self.lists[one.list].append(one)
            self.outstanding.append(one.id)
            self.gaps[one.shape].note(one.rows, now_ns)
        elif admission.reason != "INVALID_TENSOR":
            self.last_refusal_ns[one.shape] = now_ns
        self.tidy()
        return admission.reason

    def tidy(self) -> None:
        """A shape with neither work nor a model is forgotten."""
        known = {one.shape for one in self.waiting} | {one.shape for one in self.running.values()} | set(self.models)
        for memory in (self.last_start_ns, self.last_refusal_ns, self.gaps):
            for shape in [shape for shape in memory if shape not in known]:
                del memory[shape]

    def tick(self, now_ns: int) -> int:
        self.clock_ns = max(self.clock_ns, now_ns)
        return self.clock_ns

    # -- going out

    def may_run(self, one: Waiting, now_ns: int, dropped: list[tuple[int, str]]) -> bool:
        reason = None
        if one.cancelled:
            reason = "CANCELLED"
        elif now_ns >= one.due_ns or (
            now_ns >= one.queue_due_ns and not one.delayed and not self.policy(one.level).delay
        ):
            reason = "DEADLINE_PASSED"
        elif now_ns >= one.queue_due_ns and not one.delayed:
            self.lists[one.list].remove(one)
            one.delayed = True
            one.listed_ns = self.tick(now_ns)
            self.lists[one.list].append(one)
            return False
        if reason is None:
            return True
        self.lists[one.list].remove(one)
        dropped.append((one.id, reason))
        return False

    def turn(self, one: Waiting, now_ns: int) -> tuple[int, int, int]:
        aging_ns = self.settings.priority_aging_us * US
        return native.rank(one.list, one.listed_ns, aging_ns, now_ns), one.listed_ns, one.list

    def head(self, now_ns: int, dropped: list[tuple[int, str]]) -> Waiting | None:
        """Who is served next. None: nobody, or so many were dropped that they are answered first."""
        heads = []
        for index in sorted(self.lists):
            for one in list(self.lists[index]):
                if len(dropped) >= DROPS_PER_TAKE:
                    return None
                if self.may_run(one, now_ns, dropped):
                    heads.append(one)
                    break
        return min(heads, key=lambda one: self.turn(one, now_ns), default=None)

    def gather(self, shape: int, now_ns: int, dropped: list[tuple[int, str]]) -> list[Waiting]:
        cap = self.prediction(shape).cap
        picked: list[Waiting] = []
        # A list that was empty is not looked at again: what DELAY moves there meanwhile is behind the others.
        lists = [index for index in sorted(self.lists) if any(one.shape == shape for one in self.lists[index])]
        while sum(one.rows for one in picked) < cap and (self.settings.dynamic_batching or not picked):
            heads = []
            for index in lists:
                for one in [other for other in self.lists[index] if other.shape == shape and other not in picked]:
                    if self.may_run(one, now_ns, dropped):
                        heads.append(one)
                        break
            heads.sort(key=lambda one: self.turn(one, now_ns))
            if not heads or (picked and sum(one.rows for one in picked) + heads[0].rows > cap):
                break
            picked.append(heads[0])
        return picked

    def take(self, instance: int, now_ns: int) -> tuple[tuple[int, ...], list[tuple[int, str]], int]:
        dropped: list[tuple[int, str]] = []
        while head := self.head(now_ns, dropped):
            shape = head.shape
            decision, picked = self.decide(shape, now_ns, dropped)
            if decision is None:
                continue
            if decision.action == "hold":
                return (), dropped, now_ns if dropped else decision.until_ns
            batch = picked[: decision.count]
            for one in batch:
                self.lists[one.list].remove(one)
            rows = sum(one.rows for one in batch)
            ids = tuple(one.id for one in batch)
            self.running[instance] = Running(ids, rows, shape, now_ns + self.time_of(shape, rows), decision.probe)
            self.last_start_ns[shape] = now_ns
            self.starts += 1
            if shape in self.models:
                self.models[shape].used = self.starts
            self.tidy()
            return ids, dropped, now_ns
        self.tidy()
        return (), dropped, now_ns if dropped else native.NEVER

    def decide(
        self, shape: int, now_ns: int, dropped: list[tuple[int, str]]
    ) -> tuple[native.Decision | None, list[Waiting]]:
        """None: the head was dropped and it may be another shape's turn, or nothing of this shape is left."""
        while picked := self.gather(shape, now_ns, dropped):
            dues = [one.queue_due_ns for one in picked if not one.delayed]
            decision = native.plan(
                self.prediction(shape),
                [(one.rows, one.due_ns, one.half_ns) for one in picked],
                now_ns,
                max_delay_ns=self.settings.max_queue_delay_us * US if self.settings.dynamic_batching else 0,
                preferred_rows=min((size for size in self.settings.preferred_batch_sizes), default=0),
                all_waiting=len(picked) == len(self.waiting),
                draining=self.closed,
                head_arrived_ns=picked[0].arrived_ns,
                start_by_ns=min(dues, default=native.NEVER),
                last_start_ns=self.last_start_ns.get(shape, 0),
                last_refusal_ns=self.last_refusal_ns.get(shape, -native.NEVER // 2),
                expected_gap_ns=self.gaps[shape].gap_ns,
            )
            if decision.action != "drop":
                return decision, picked
            late = picked[decision.index]
            self.lists[late.list].remove(late)
            dropped.append((late.id, "DEADLINE_PASSED"))
            self.last_refusal_ns[shape] = now_ns
            if len(dropped) >= DROPS_PER_TAKE:
                return None, []
            if decision.index == 0 and len({one.shape for one in self.waiting}) > 1:
                return None, []
        return None, []

    def finish(self, instance: int, run_ns: int, ok: bool, now_ns: int) -> None:
        done = self.running.pop(instance)
        if ok:
            self.learn(done, run_ns, now_ns)
        self.tidy()

    def learn(self, done: Running, run_ns: int, now_ns: int) -> None:
        if done.shape not in self.models:
            if len(self.models) >= SHAPE_MODELS:
                del self.models[min(self.models, key=lambda shape: self.models[shape].used)]
            predictor = native.Predictor(self.settings.max_batch_rows, self.settings.slo_us * US)
            self.models[done.shape] = ShapeModel(predictor)
        self.models[done.shape].used = self.starts
        self.models[done.shape].predictor.observe(done.rows, run_ns, now_ns, probe=done.probe)

    # -- order of answers

    def release(self, request_id: int) -> list[int]:
        self.released.add(request_id)
        return self.leave()

    def remove(self, request_id: int) -> list[int] | None:
        for one in self.waiting:
            if one.id == request_id:
                self.lists[one.list].remove(one)
                self.outstanding.remove(request_id)
                self.tidy()
                return self.leave() if self.settings.preserve_ordering else []
        return None

    def leave(self) -> list[int]:
        left = []
        while self.outstanding and self.outstanding[0] in self.released:
            left.append(self.outstanding.pop(0))
        return left


policies = st.builds(
    QueuePolicySettings,
    delay=st.booleans(),
    default_timeout_us=st.sampled_from([0, 0, 400, 3_000]),
    allow_timeout_override=st.booleans(),
    max_queue_size=st.sampled_from([0, 0, 6]),
)


@st.composite
def all_settings(draw: st.DrawFn) -> BatchSettings:
    levels = draw(st.sampled_from([0, 0, 1, 3]))
    return BatchSettings(
        dynamic_batching=draw(st.sampled_from([True, True, True, False])),
        max_batch_rows=draw(st.integers(1, 9)),
        preferred_batch_sizes=draw(st.sampled_from([(), (), (2, 4)])),
        max_queue_delay_us=draw(st.sampled_from([0, 0, 700])),
        preserve_ordering=draw(st.booleans()),
        priority_levels=levels,
        default_priority_level=draw(st.integers(1, levels)) if levels else 0,
        default_policy=draw(policies),
        level_policies={draw(st.integers(1, levels)): draw(policies)} if levels else {},
        slo_us=draw(st.sampled_from([0, 0, 5_000])),
        priority_aging_us=draw(st.sampled_from([0, 300, 100_000])),
    )


def arrivals(shapes: int) -> st.SearchStrategy[tuple[int, int, int, int, int]]:
    """rows, priority, timeout, time until due, shape."""
    return st.tuples(
        st.integers(1, 4),
        st.sampled_from([0, 0, 1, 2, 3, 4]),
        st.sampled_from([0, 0, 0, 200, 2_000]),
        st.sampled_from([native.NEVER, native.NEVER, 50 * US, 600 * US, 4 * MS]),
        st.integers(0, shapes - 1),
    )


class QueueMachine(RuleBasedStateMachine):
    """Native queue and model side by side: the same requests, the same times, the same answers."""

    @initialize(
        settings=all_settings(),
        instances=st.integers(1, 3),
        taught_us=st.sampled_from([0, 0, 300, 2_000]),
    )
    def start(self, settings: BatchSettings, instances: int, taught_us: int) -> None:
        self.now_ns = START
        self.native = native.BatchQueue(settings, instances)
        self.model = QueueModel(settings, instances)
        self.next_id = 0
        self.ends: Counter[int] = Counter()
        self.accepted: dict[int, native.Arrival] = {}
        self.unreleased: list[int] = []
        if taught_us:  # shape 0 has run often enough to be trusted
            for n in range(60):
                self.push([(1 + n % settings.max_batch_rows, 0, 0, native.NEVER, 0)])
                self.advance(taught_us)
                self.take(0)
                if 0 in self.model.running:
                    rows = self.model.running[0].rows
                    self.finish(0, taught_us * US + rows * taught_us * US // 10, ok=True)

    def end(self, request_id: int) -> None:
        """The one end of a request."""
        self.ends[request_id] += 1
        if self.model.settings.preserve_ordering:
            self.unreleased.append(request_id)

    def free(self) -> list[int]:
        return [one for one in range(self.model.instances) if one not in self.model.running]

    @rule(burst=st.lists(arrivals(shapes=3), min_size=1, max_size=6), behind_us=st.sampled_from([0, 0, 0, 35]))
    def push_some(self, burst: list[tuple[int, int, int, int, int]], behind_us: int) -> None:
        # An I/O thread looks at the clock before it gets the lock, so its time may be behind another's.
        self.push(burst, behind_us * US)

    @rule(burst=st.lists(arrivals(shapes=24), min_size=8, max_size=24))
    def push_many_shapes(self, burst: list[tuple[int, int, int, int, int]]) -> None:
        self.push(burst)

    def push(self, burst: list[tuple[int, int, int, int, int]], behind_ns: int = 0) -> None:
        made = []
        at_ns = self.now_ns - behind_ns
        for rows, priority, timeout_us, due_in_ns, shape in burst:
            due_ns = native.NEVER if due_in_ns == native.NEVER else at_ns + due_in_ns
            fitting = min(rows, self.model.settings.max_batch_rows)
            made.append((self.next_id, native.Arrival(fitting, priority, timeout_us, due_ns, shape)))
            self.next_id += 1
        pushed = self.native.push([arrival for _, arrival in made], at_ns)
        assert [one.reason for one in pushed] == self.model.push(made, at_ns)
        for one, (request_id, arrival) in zip(pushed, made, strict=True):
            assert one.id == request_id
            if one.reason == "OK":
                self.accepted[request_id] = arrival

    @rule(by_us=st.sampled_from([0, 1, 30, 400, 2_500, 150_000]))
    def advance(self, by_us: int) -> None:
        self.now_ns += by_us * US

    @precondition(lambda self: self.free())
    @rule(data=st.data())
    def take_one(self, data: st.DataObject) -> None:
        self.take(data.draw(st.sampled_from(self.free())))

    def take(self, instance: int) -> None:
        waiting = {one.id: one for one in self.model.waiting}
        ids, dropped, again_ns = self.model.take(instance, self.now_ns)
        taken = self.native.try_take(instance, self.now_ns)
        assert (taken.ids, list(taken.dropped), taken.again_ns) == (ids, dropped, again_ns)
        # Promises that hold whatever the model says.
        batch = [waiting[request_id] for request_id in taken.ids]
        assert taken.rows == sum(one.rows for one in batch) <= self.model.settings.max_batch_rows
        assert len({one.shape for one in batch}) <= 1
        assert all(not one.cancelled and self.now_ns < one.due_ns for one in batch)
        assert self.model.settings.dynamic_batching or len(batch) <= 1
        if taken.again_ns not in (self.now_ns, native.NEVER):
            assert self.model.settings.max_queue_delay_us > 0
        for request_id, _ in dropped:
            self.end(request_id)

    @precondition(lambda self: self.model.running)
    @rule(data=st.data(), run_us=st.sampled_from([100, 1_000, 20_000]), ok=st.sampled_from([True, True, True, False]))
    def finish_one(self, data: st.DataObject, run_us: int, ok: bool) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.model.running))), run_us * US, ok)

    def finish(self, instance: int, run_ns: int, ok: bool) -> None:
        for request_id in self.model.running[instance].ids:
            self.end(request_id)
        self.native.finished(instance, run_ns, self.now_ns, ok=ok)
        self.model.finish(instance, run_ns, ok, self.now_ns)

    @precondition(lambda self: self.model.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([one.id for one in self.model.waiting]))
        assert self.native.remove(request_id) == (True, self.model.remove(request_id))
        self.ends[request_id] += 1

    @precondition(lambda self: self.model.running)
    @rule(data=st.data())
    def remove_too_late(self, data: st.DataObject) -> None:
        running = [request_id for one in self.model.running.values() for request_id in one.ids]
        assert self.native.remove(data.draw(st.sampled_from(running))) == (False, [])

    @precondition(lambda self: self.model.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.model.waiting))
        one.cancelled = True
        self.native.cancel(one.id)

    @precondition(lambda self: self.unreleased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.unreleased))
        self.unreleased.remove(request_id)
        assert self.native.release(request_id) == self.model.release(request_id)

    @precondition(lambda self: self.next_id > 60)
    @rule()
    def close(self) -> None:
        self.model.closed = True
        self.native.close()

    @invariant()
    def both_hold_the_same(self) -> None:
        if not hasattr(self, "model"):
            return
        view = self.native.view()
        assert view["waiting"] == len(self.model.waiting)
        assert view["waiting_rows"] == sum(one.rows for one in self.model.waiting)
        assert view["running_rows"] == sum(one.rows for one in self.model.running.values())

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for instance in sorted(self.model.running):
            self.finish(instance, MS, ok=True)
        self.model.closed = True
        self.native.close()
        while self.model.waiting:
            self.take(0)
            if 0 in self.model.running:
                self.finish(0, MS, ok=True)
        assert self.native.try_take(0, self.now_ns).again_ns == native.NEVER
        assert self.ends == Counter(self.accepted.keys())
        while self.unreleased:
            request_id = self.unreleased.pop()
            assert self.native.release(request_id) == self.model.release(request_id)
        if self.model.settings.preserve_ordering:
            assert not self.model.outstanding


QueueMachine.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=50, deadline=None)


class TestQueueAgainstItsModel(QueueMachine.TestCase):  # type: ignore[name-defined,misc]
    """Any sequence of pushes, takes, ends, removals and cancellations, under any configuration."""
