"""Batching policy, admission, order and run-time model: pure functions, so their promises are properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from server import _native as native

US = 1_000
MS = 1_000_000
NOW = 10_000 * MS

# For properties of an outcome that only some inputs have. None at all is still an error.
of_some = settings(suppress_health_check=[HealthCheck.filter_too_much])

Candidate = tuple[int, int, int]  # rows, due_ns, half_ns


def sizes_of(max_rows: int) -> tuple[int, ...]:
    sizes = [1]
    while sizes[-1] < max_rows:
        sizes.append(min(sizes[-1] * 2, max_rows))
    return tuple(sizes)


def a_prediction(max_rows: int = 8, **changes: Any) -> native.Prediction:
    """100 us and 10 us a row, the tail twice that; trusted, no limits."""
    sizes = sizes_of(max_rows)
    l50 = tuple(100 * US + 10 * US * size for size in sizes)
    good = native.Prediction(
        sizes, l50, tuple(2 * time for time in l50), beta_ns=100 * US, knee=max_rows, cap=max_rows, trusted=True
    )
    return good._replace(**changes)


def time_of(prediction: native.Prediction, times: tuple[int, ...], rows: int) -> int:
    """Linear between the sizes; 0 rows take no time and no size is beyond the last."""
    if rows == 0:
        return 0
    below = 0
    below_time = None
    for size, time in zip(prediction.sizes, times, strict=True):
        if rows <= size:
            if below_time is None or rows == size:
                return time
            step = time - below_time
            return below_time + int(
                step * (rows - below) / (size - below) if step < 0 else step * (rows - below) // (size - below)
            )
        below, below_time = size, time
    return times[-1]


def need_of(prediction: native.Prediction, candidate: Candidate, rows: int, now_ns: int) -> int:
    """What a run of `rows` must be given: the typical time, or the tail once half of the candidate's time is gone."""
    times = prediction.l50_ns if now_ns < candidate[2] else prediction.l99_ns
    return time_of(prediction, times, rows) + native.SLACK_NS


def in_time(prediction: native.Prediction, candidate: Candidate, rows: int, now_ns: int = NOW) -> bool:
    return now_ns + need_of(prediction, candidate, rows, now_ns) <= candidate[1]


@st.composite
def predictions(draw: st.DrawFn, trusted: bool | None = None) -> native.Prediction:
    max_rows = draw(st.integers(1, 70))
    sizes = sizes_of(max_rows)
    base = draw(st.integers(0, 2 * MS))
    row = draw(st.integers(0, 100 * US))
    tail = draw(st.integers(0, 3 * MS))
    l50 = tuple(base + row * size for size in sizes)
    cap = draw(st.integers(1, max_rows))
    return native.Prediction(
        sizes,
        l50,
        tuple(time + tail for time in l50),
        beta_ns=base,
        knee=draw(st.integers(1, cap)),
        cap=cap,
        trusted=draw(st.booleans()) if trusted is None else trusted,
    )


@dataclass(frozen=True)
class Situation:
    prediction: native.Prediction
    candidates: tuple[Candidate, ...]
    view: dict[str, Any]

    def plan(self, now_ns: int = NOW) -> native.Decision:
        return native.plan(self.prediction, self.candidates, now_ns, **self.view)

    def rows(self, count: int | None = None) -> int:
        return sum(rows for rows, _, _ in self.candidates[:count])

    def overload(self) -> bool:
        """Somebody was refused lately."""
        tail_ns = time_of(self.prediction, self.prediction.l99_ns, self.prediction.cap)
        return NOW - int(self.view["last_refusal_ns"]) < native.pause_ns(tail_ns)

    def least(self) -> int:
        """How many candidates make the shortest batch worth running."""
        worth = self.rows() if self.overload() else min(self.rows(), self.prediction.knee)
        return next(n for n in range(1, len(self.candidates) + 1) if self.rows(n) >= worth)


dues = st.one_of(st.just(native.NEVER), st.integers(NOW + 1, NOW + 12 * MS))


@st.composite
def situations(draw: st.DrawFn, late: bool = False, hold: bool = False) -> Situation:
    """Any; or such that most have somebody for whom it is late; or such that most are held."""
    prediction = draw(predictions(trusted=True if late else None))
    tight_ns = 2 * (time_of(prediction, prediction.l99_ns, prediction.cap) + native.SLACK_NS)
    some_dues = st.integers(NOW + 1, NOW + tight_ns) if late else dues
    candidates: list[Candidate] = []
    left = draw(st.integers(1, prediction.knee)) - 1 if hold else prediction.cap
    for _ in range(draw(st.integers(1 if late or hold else 0, 12))):
        rows = draw(st.integers(1, max(left, 1) if late or hold else prediction.sizes[-1]))
        if candidates and rows > left:
            break
        left -= rows
        due_ns = draw(st.just(native.NEVER) | some_dues)
        candidates.append((rows, due_ns, draw(st.integers(NOW - 5 * MS, min(due_ns, NOW + 12 * MS)))))
    flag = st.just(False) if hold else st.booleans()
    view = {
        "max_delay_ns": draw(st.sampled_from([5 * MS, 20 * MS] if hold else [0, 0, 500 * US, 20 * MS])),
        "preferred_rows": draw(st.sampled_from([0, 0, 2, 8])),
        "all_waiting": not draw(flag),
        "draining": draw(flag),
        "head_arrived_ns": NOW - draw(st.integers(0, (4 if hold else 10) * MS)),
        "start_by_ns": draw(dues),
        "last_start_ns": NOW - draw(st.integers(0, 200 * MS)),
        "last_refusal_ns": NOW - draw(st.sampled_from([0, 5 * MS, 50 * MS, 9_000 * MS, 9_000 * MS])),
        "expected_gap_ns": draw(st.sampled_from([native.NEVER, 1 * US, 10 * MS])),
        "other_work": draw(st.booleans()),
    }
    return Situation(prediction, tuple(candidates), view)


# -- plan -------------------------------------------------------------------------------------------------------------


@given(situations())
def test_is_idle_only_without_candidates(situation: Situation) -> None:
    assert (situation.plan().action == "idle") == (not situation.candidates)


@given(situations())
def test_dispatches_and_drops_only_what_is_there(situation: Situation) -> None:
    decision = situation.plan()
    n = len(situation.candidates)
    if decision.action == "dispatch":
        assert 1 <= decision.count <= n
    if decision.action == "drop":
        assert 0 <= decision.index < n


@of_some
@given(situations(hold=True))
def test_a_hold_lies_in_the_future_and_makes_nobody_late(situation: Situation) -> None:
    decision = situation.plan()
    assume(decision.action == "hold")
    view = situation.view
    assert NOW < decision.until_ns <= view["head_arrived_ns"] + view["max_delay_ns"]
    assert decision.until_ns <= view["start_by_ns"]
    for candidate in situation.candidates:
        assert in_time(situation.prediction, candidate, situation.rows(), decision.until_ns) or not (
            situation.prediction.trusted
        )


@of_some
@given(situations(hold=True))
def test_a_hold_needs_a_delay_company_to_come_and_room_for_it(situation: Situation) -> None:
    decision = situation.plan()
    assume(decision.action == "hold")
    view = situation.view
    assert view["max_delay_ns"] > 0
    assert view["all_waiting"]
    assert not view["draining"]
    assert situation.rows() < (view["preferred_rows"] or situation.prediction.cap)
    if situation.prediction.trusted:
        assert situation.rows() < situation.prediction.knee
        assert view["other_work"] or view["expected_gap_ns"] < situation.prediction.beta_ns


@given(situations())
def test_without_a_delay_nothing_is_ever_held(situation: Situation) -> None:
    situation.view["max_delay_ns"] = 0
    assert situation.plan().action != "hold"


@given(situations())
def test_before_a_prediction_is_trusted_nobody_is_dropped_and_everybody_goes(situation: Situation) -> None:
    untrusted = Situation(situation.prediction._replace(trusted=False), situation.candidates, situation.view)
    decision = untrusted.plan()
    assert decision.action in ("idle", "hold", "dispatch")
    if decision.action == "dispatch":
        assert decision.count == len(situation.candidates)


@of_some
@given(situations(late=True))
def test_drops_only_who_would_be_late_in_the_shortest_batch_worth_running(situation: Situation) -> None:
    decision = situation.plan()
    assume(decision.action == "drop")
    assert situation.prediction.trusted
    least = situation.least()
    assert decision.index < least
    assert not in_time(situation.prediction, situation.candidates[decision.index], situation.rows(least))


@of_some
@given(situations(late=True))
def test_whoever_is_dispatched_on_a_trusted_prediction_is_in_time(situation: Situation) -> None:
    decision = situation.plan()
    assume(decision.action == "dispatch" and not decision.probe and situation.prediction.trusted)
    for candidate in situation.candidates[: decision.count]:
        assert in_time(situation.prediction, candidate, situation.rows(decision.count))


@of_some
@given(situations(late=True))
def test_a_shortened_batch_reaches_the_knee_and_could_not_be_longer(situation: Situation) -> None:
    decision = situation.plan()
    assume(decision.action == "dispatch" and not decision.probe and decision.count < len(situation.candidates))
    assert situation.rows(decision.count) >= situation.prediction.knee
    assert not situation.overload()
    longer = situation.candidates[: decision.count + 1]
    rows = situation.rows(decision.count + 1)
    assert not all(in_time(situation.prediction, candidate, rows) for candidate in longer)


@given(situations(late=True))
def test_a_head_that_is_late_by_itself_is_a_probe_after_a_pause_and_only_then(situation: Situation) -> None:
    rows = situation.candidates[0][0]
    tail_ns = time_of(situation.prediction, situation.prediction.l99_ns, rows)
    late_head = (rows, NOW + tail_ns + native.SLACK_NS - 1, NOW)
    pause_ns = native.pause_ns(tail_ns)
    candidates = (late_head, *situation.candidates[1:])
    tested = Situation(situation.prediction, candidates, situation.view | {"last_start_ns": NOW - pause_ns})
    decision = tested.plan()
    assert (decision.action, decision.count, decision.probe) == ("dispatch", 1, True)
    tested.view["last_start_ns"] += 1
    assert tested.plan().action == "drop"


@of_some
@given(situations(late=True))
def test_a_head_that_is_in_time_by_itself_is_never_a_probe(situation: Situation) -> None:
    head = situation.candidates[0]
    assume(in_time(situation.prediction, head, head[0]))
    assert not situation.plan().probe


@given(situations(late=True))
def test_dropping_one_after_another_ends_in_work_or_in_nothing(situation: Situation) -> None:
    left = list(situation.candidates)
    for _ in range(len(left) + 1):
        decision = Situation(situation.prediction, tuple(left), situation.view).plan()
        if decision.action != "drop":
            break
        del left[decision.index]
    assert decision.action == ("idle" if not left else decision.action)
    assert decision.action != "drop"


@of_some
@given(situations(late=True))
def test_a_request_without_a_deadline_is_never_dropped(situation: Situation) -> None:
    decision = situation.plan()
    assume(decision.action == "drop")
    assert situation.candidates[decision.index][1] != native.NEVER


def test_one_hopeless_head_does_not_ruin_the_batch() -> None:
    slow_head = (1, NOW + 200 * US, 0)
    others = [(1, NOW + 20 * MS, NOW + 10 * MS)] * 3
    decision = native.plan(a_prediction(knee=4), [slow_head, *others], NOW, last_start_ns=NOW)
    assert (decision.action, decision.index) == ("drop", 0)


def test_near_a_deadline_the_batch_shrinks_to_what_keeps_it() -> None:
    # Four rows take 280 us by the tail, five 300 us; slack is 50 us.
    candidates = [(1, NOW + 340 * US, 0)] + [(1, native.NEVER, 0)] * 7
    decision = native.plan(a_prediction(knee=2), candidates, NOW)
    assert (decision.action, decision.count) == ("dispatch", 4)


def test_in_an_overload_a_late_head_goes_and_the_batch_stays_full() -> None:
    candidates = [(1, NOW + 340 * US, 0)] + [(1, native.NEVER, 0)] * 7
    decision = native.plan(a_prediction(knee=2), candidates, NOW, last_start_ns=NOW, last_refusal_ns=NOW - MS)
    assert (decision.action, decision.index) == ("drop", 0)
    decision = native.plan(a_prediction(knee=2), candidates, NOW, last_start_ns=NOW, last_refusal_ns=NOW - 100 * MS)
    assert (decision.action, decision.count) == ("dispatch", 4)


def test_stalls_beyond_the_deadline_do_not_refuse_those_who_will_most_likely_make_it() -> None:
    # One run in fifty is stalled for 20 ms; all the others take 0.5 ms, and callers wait for 5 ms.
    stalled = native.Prediction((1,), (500 * US,), (20 * MS,), beta_ns=0, knee=1, cap=1, trusted=True)
    fresh = (1, NOW + 4 * MS, NOW + 1_500 * US)
    worn = (1, NOW + 2 * MS, NOW - 500 * US)
    assert native.plan(stalled, [fresh], NOW, last_start_ns=NOW).action == "dispatch"
    assert native.plan(stalled, [worn], NOW, last_start_ns=NOW).action == "drop"


def test_a_prediction_that_forbids_all_work_is_put_to_the_test() -> None:
    hopeless = a_prediction(1, l50_ns=(900 * MS,), l99_ns=(900 * MS,))
    head = [(1, NOW + 5 * MS, NOW + 2 * MS)]
    pause = native.pause_ns(900 * MS)
    assert native.plan(hopeless, head, NOW, last_start_ns=NOW - pause + 1).action == "drop"
    assert native.plan(hopeless, head, NOW, last_start_ns=NOW - pause).probe


def test_a_preferred_size_ends_a_hold() -> None:
    untrusted = a_prediction(trusted=False)
    view: dict[str, Any] = {"max_delay_ns": MS, "head_arrived_ns": NOW, "preferred_rows": 3}
    assert native.plan(untrusted, [(2, native.NEVER, 0)], NOW, **view).action == "hold"
    assert native.plan(untrusted, [(3, native.NEVER, 0)], NOW, **view).action == "dispatch"


# -- order ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 199), st.integers(0, 10**12), st.integers(1, 10**9), st.integers(0, 10**12), st.integers(0, 10**12)
)
def test_waiting_only_lifts_a_request(index: int, since_ns: int, aging_ns: int, waited_ns: int, more_ns: int) -> None:
    now_ns = since_ns + waited_ns
    first = native.rank(index, since_ns, aging_ns, now_ns)
    assert native.rank(index, since_ns, aging_ns, now_ns + more_ns) <= first <= index


@given(st.integers(0, 99), st.integers(0, 1), st.integers(1, 10**9))
def test_each_aging_time_lifts_by_one_level(level: int, delayed: int, aging_ns: int) -> None:
    for lifts in range(level + 2):
        expected = max(2 * (level - lifts) + delayed, 0) if lifts <= level else 0
        assert native.rank(2 * level + delayed, 0, aging_ns, lifts * aging_ns) == expected
        assert native.rank(2 * level + delayed, 0, aging_ns, (lifts + 1) * aging_ns - 1) == expected


@given(st.integers(0, 199), st.integers(0, 10**15))
def test_without_aging_the_order_of_levels_is_strict(index: int, now_ns: int) -> None:
    assert native.rank(index, 0, 0, now_ns) == index


# -- admission --------------------------------------------------------------------------------------------------------


@st.composite
def admissions(draw: st.DrawFn, late: bool = False) -> dict[str, Any]:
    """Any; or such that most come too late."""
    prediction = draw(predictions(trusted=True if late else None))
    max_rows = prediction.sizes[-1]
    instances = draw(st.integers(1, 4))
    due_ns = draw(st.integers(NOW + 1, NOW + MS) if late else dues)
    return {
        "prediction": prediction,
        "now_ns": NOW,
        "rows": draw(st.integers(1, max_rows)),
        "due_ns": due_ns,
        "half_ns": draw(st.integers(NOW - 5 * MS, min(due_ns, NOW + 12 * MS))),
        "start_by_ns": draw(dues),
        "waiting": draw(st.integers(0, 20)),
        "max_waiting": draw(st.integers(21 if late else 1, 40)),
        "rows_ahead": draw(st.integers(100 if late else 0, 500)),
        "requests_ahead": draw(st.integers(0, 100)),
        "free_ns": sorted(NOW + draw(st.integers(1 if late else -5 * MS, 5 * MS)) for _ in range(instances)),
        "gap_ns": draw(st.sampled_from([native.NEVER, MS, 10 * US, 1])),
        "max_rows": max_rows,
        "batching": draw(st.booleans()),
    }


@given(admissions())
def test_a_full_queue_refuses_with_a_time_to_come_back(request: dict[str, Any]) -> None:
    request["waiting"] = request["max_waiting"]
    admission = native.admit(**request)
    assert admission.reason == "QUEUE_FULL"
    assert native.pushback_ms(admission.pushback_ns) >= 1


@of_some
@given(admissions())
def test_with_room_only_time_refuses(request: dict[str, Any]) -> None:
    assume(request["waiting"] < request["max_waiting"])
    assert native.admit(**request).reason in ("OK", "TOO_LATE")


@given(admissions())
def test_before_a_prediction_is_trusted_time_refuses_nobody(request: dict[str, Any]) -> None:
    request["prediction"] = request["prediction"]._replace(trusted=False)
    assert native.admit(**request).reason != "TOO_LATE"


@given(admissions())
def test_time_refuses_nobody_without_a_deadline(request: dict[str, Any]) -> None:
    assert native.admit(**(request | {"due_ns": native.NEVER, "start_by_ns": native.NEVER})).reason != "TOO_LATE"


@of_some
@given(admissions())
def test_time_refuses_nobody_whom_an_idle_instance_would_take_now(request: dict[str, Any]) -> None:
    idle = sum(free_ns <= NOW for free_ns in request["free_ns"])
    assume(idle > 0)
    if request["batching"]:
        request["rows_ahead"] = min(request["rows_ahead"], request["prediction"].cap * idle - request["rows"])
        assume(request["rows_ahead"] >= 0)
    else:
        request["requests_ahead"] = min(request["requests_ahead"], idle - 1)
    assert native.admit(**request).reason != "TOO_LATE"


@of_some
@given(admissions(late=True))
def test_who_is_too_late_would_not_be_with_the_pushback_more(request: dict[str, Any]) -> None:
    refused = native.admit(**request)
    assume(refused.reason == "TOO_LATE")
    assert refused.pushback_ns > 0
    for limit in ("due_ns", "start_by_ns"):
        request[limit] = min(request[limit] + refused.pushback_ns, native.NEVER)
    assert native.admit(**request).reason == "OK"


@of_some
@given(admissions(late=True))
def test_a_busier_queue_is_no_quicker(request: dict[str, Any]) -> None:
    # A whole batch for each instance more ahead, and everything else the same.
    assume(native.admit(**request).reason == "TOO_LATE")
    request["rows_ahead"] += request["prediction"].cap * len(request["free_ns"])
    request["requests_ahead"] += len(request["free_ns"])
    assert native.admit(**request).reason == "TOO_LATE"


@pytest.mark.parametrize("rows", [0, 9])
def test_rows_out_of_bounds_are_the_callers_mistake(rows: int) -> None:
    assert native.admit(a_prediction(8), NOW, rows=rows, max_rows=8).reason == "INVALID_TENSOR"


@pytest.mark.parametrize("limit", ["due_ns", "start_by_ns"])
def test_who_is_late_already_is_told_so(limit: str) -> None:
    assert native.admit(a_prediction(8), NOW, max_rows=8, **{limit: NOW}).reason == "DEADLINE_PASSED"


def test_the_predicted_wait_counts_the_busy_instance_the_batches_ahead_and_its_own() -> None:
    flat = a_prediction(8, l50_ns=(MS, MS, MS, MS), l99_ns=(MS, MS, MS, MS))
    # The running batch ends in 0.5 ms, then 3 full ones, then its own, then the wire.
    end_ns = NOW + 500 * US + 4 * MS + native.SLACK_NS
    ask: dict[str, Any] = {"rows_ahead": 24, "free_ns": [NOW + 500 * US], "max_rows": 8}
    assert native.admit(flat, NOW, due_ns=end_ns, **ask).reason == "OK"
    assert native.admit(flat, NOW, due_ns=end_ns - 1, **ask) == ("TOO_LATE", 1)
    assert native.admit(flat, NOW, start_by_ns=NOW + 500 * US + 3 * MS - 1, **ask) == ("TOO_LATE", 1)


def test_batches_ahead_are_dealt_out_to_the_instances_in_the_order_they_are_free() -> None:
    flat = a_prediction(8, l50_ns=(MS, MS, MS, MS), l99_ns=(MS, MS, MS, MS))
    free_ns = [NOW + 200 * US, NOW + 700 * US]
    for before, start_us in enumerate((200, 700, 1_200, 1_700, 2_200)):
        end_ns = NOW + start_us * US + MS + native.SLACK_NS
        ask: dict[str, Any] = {"rows_ahead": 8 * before, "free_ns": free_ns, "max_rows": 8}
        assert native.admit(flat, NOW, due_ns=end_ns, **ask).reason == "OK"
        assert native.admit(flat, NOW, due_ns=end_ns - 1, **ask).reason == "TOO_LATE"


def test_who_joins_behind_counts_into_the_batch_that_a_request_will_be_part_of() -> None:
    # One row takes 220 us by the tail, five take 300 us; the instance is free in 400 us.
    ask: dict[str, Any] = {"free_ns": [NOW + 400 * US], "max_rows": 8}
    alone_ns = NOW + 400 * US + 220 * US + native.SLACK_NS
    assert native.admit(a_prediction(), NOW, due_ns=alone_ns, gap_ns=native.NEVER, **ask).reason == "OK"
    assert native.admit(a_prediction(), NOW, due_ns=alone_ns, gap_ns=100 * US, **ask) == ("TOO_LATE", 80 * US)
    full_ns = NOW + 400 * US + 360 * US + native.SLACK_NS
    assert native.admit(a_prediction(), NOW, due_ns=full_ns, gap_ns=1, **ask).reason == "OK"


@pytest.mark.parametrize(
    ("pushback_ns", "ms"), [(-1, -1), (0, 1), (1, 1), (MS, 1), (MS + 1, 2), (10**15, 60_000), (native.NEVER, 60_000)]
)
def test_pushback_is_in_whole_milliseconds_and_never_says_at_once(pushback_ns: int, ms: int) -> None:
    assert native.pushback_ms(pushback_ns) == ms


# -- run-time model ---------------------------------------------------------------------------------------------------


def observe(predictor: native.Predictor, rows: int, run_ns: int, times: int = 1, now_ns: int = NOW) -> None:
    for _ in range(times):
        predictor.observe(rows, run_ns, now_ns)


def taught(max_rows: int, beta_ns: int, alpha_ns: int, slo_ns: int = 0) -> native.Predictor:
    """A model that has seen every size of a linear run time often enough."""
    predictor = native.Predictor(max_rows, slo_ns)
    for _ in range(60):
        for size in sizes_of(max_rows):
            predictor.observe(size, beta_ns + alpha_ns * size, NOW)
    predictor.observe(1, beta_ns + alpha_ns, NOW + 1_000 * MS)  # refits
    return predictor


observations = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 10**10), st.integers(0, 300 * MS), st.booleans()), max_size=200
)


@given(st.integers(1, 40), st.sampled_from([0, MS, 50 * MS]), observations)
def test_whatever_it_sees_its_limits_stay_in_order(
    max_rows: int, slo_ns: int, seen: list[tuple[int, int, int, bool]]
) -> None:
    predictor = native.Predictor(max_rows, slo_ns)
    now_ns = NOW
    for rows, run_ns, gap_ns, probe in seen:
        now_ns += gap_ns
        predictor.observe(rows, run_ns, now_ns, probe=probe)
        prediction = predictor.prediction
        assert 1 <= prediction.knee <= prediction.cap <= max_rows
        assert prediction.beta_ns >= 0
        assert all(0 <= usual <= tail for usual, tail in zip(prediction.l50_ns, prediction.l99_ns, strict=True))
        assert prediction.trusted == (predictor.runs >= native.TRUSTED_RUNS)
    if len(seen) < native.TRUSTED_RUNS:
        assert (predictor.prediction.knee, predictor.prediction.cap) == (max_rows, max_rows)


@given(st.integers(1, 64), st.integers(1, 5 * MS), st.integers(0, 200 * US))
def test_a_linear_run_time_is_found(max_rows: int, beta_ns: int, alpha_ns: int) -> None:
    predictor = taught(max_rows, beta_ns, alpha_ns)
    for rows in range(1, max_rows + 1):
        assert abs(predictor.l50_ns(rows) - (beta_ns + alpha_ns * rows)) <= 1
    if max_rows > 1:
        assert predictor.prediction.beta_ns == pytest.approx(beta_ns, rel=0.01, abs=10)
    # The least batch that reaches 0.9 of the best throughput, to the rounding of whole nanoseconds.
    best = max(rows / predictor.l50_ns(rows) for rows in sizes_of(max_rows))
    knee = predictor.prediction.knee
    assert knee / predictor.l50_ns(knee) >= 0.9 * best
    assert knee == 1 or (knee - 1) / predictor.l50_ns(knee - 1) < 0.9 * best


@given(st.integers(1, 64), st.integers(1, 5 * MS), st.integers(0, 200 * US), st.integers(1, 40 * MS))
def test_the_cap_is_the_largest_batch_that_keeps_the_target_twice(
    max_rows: int, beta_ns: int, alpha_ns: int, slo_ns: int
) -> None:
    predictor = taught(max_rows, beta_ns, alpha_ns, slo_ns)
    cap = predictor.prediction.cap
    assert cap == 1 or 2 * predictor.l99_ns(cap) <= slo_ns
    assert cap == max_rows or 2 * predictor.l99_ns(cap + 1) > slo_ns


def test_without_a_target_the_cap_is_the_largest_batch() -> None:
    assert taught(16, 10 * MS, MS).prediction.cap == 16


def test_a_tail_that_no_size_escapes_does_not_shrink_batches_to_one() -> None:
    predictor = native.Predictor(16, 20 * MS)
    for n in range(100):
        for size in sizes_of(16):
            predictor.observe(size, 50 * MS if n % 20 == 0 else 2 * MS, NOW)
    predictor.observe(1, 2 * MS, NOW + 1_000 * MS)
    # Slightly less, as the safety net reacts to predictions that do not hold.
    assert predictor.prediction.cap >= 14


def test_a_size_that_was_never_run_is_assumed_to_be_as_fast_as_the_others_allow() -> None:
    predictor = native.Predictor(8)
    observe(predictor, 4, 400 * US)
    assert predictor.prediction.l50_ns == (100 * US, 200 * US, 400 * US, 400 * US)
    observe(predictor, 2, 300 * US)
    assert predictor.prediction.l50_ns == (150 * US, 300 * US, 400 * US, 600 * US)
    assert predictor.measured_l50_ns == (0, 300 * US, 400 * US, 0)


def test_a_stall_at_one_size_is_not_believed_where_more_rows_are_quicker() -> None:
    predictor = native.Predictor(8)
    observe(predictor, 8, 2 * MS, 60)
    observe(predictor, 1, MS, 60)
    observe(predictor, 4, 70 * MS)
    assert predictor.prediction.l50_ns[2] == 2 * MS
    assert predictor.prediction.l99_ns[2] == 2 * MS


def test_a_run_between_two_sizes_speaks_for_the_upper_one_along_the_line() -> None:
    predictor = native.Predictor(8)
    observe(predictor, 1, 120 * US)
    observe(predictor, 5, 200 * US)
    assert predictor.prediction.l50_ns == (120 * US, 140 * US, 180 * US, 260 * US)
    observe(predictor, 6, 220 * US, 3)
    assert predictor.prediction.l50_ns[3] == pytest.approx(260 * US, rel=0.001)


def test_what_was_known_of_the_fixed_part_outlives_the_small_sizes() -> None:
    predictor = taught(8, 100 * US, 10 * US)
    for second in range(2, 12):
        observe(predictor, 8, 180 * US, 20, NOW + second * 1_000 * MS)
    assert predictor.measured_l50_ns[:3] == (0, 0, 0)
    assert predictor.l50_ns(1) == pytest.approx(110 * US, rel=0.01)


def test_the_tail_is_the_second_longest_of_a_hundred_runs() -> None:
    predictor = native.Predictor(1)
    observe(predictor, 1, MS, 99)
    observe(predictor, 1, 7 * MS)
    assert predictor.prediction.l99_ns[0] < 1.2 * MS
    observe(predictor, 1, 5 * MS)
    assert predictor.prediction.l99_ns == (5 * MS,)
    observe(predictor, 1, MS, 99)
    assert predictor.prediction.l99_ns[0] < 1.2 * MS


def test_a_lone_stall_does_not_become_the_tail_when_the_older_half_is_forgotten() -> None:
    predictor = native.Predictor(2)
    observe(predictor, 2, MS, 99)
    observe(predictor, 2, 70 * MS)
    observe(predictor, 1, MS, 20, NOW)
    for second in range(1, 3):
        observe(predictor, 1, MS, 20, NOW + second * 1_000 * MS)
    assert predictor.prediction.l99_ns[1] < 2 * MS


def test_one_stall_hardly_moves_the_usual_run_time() -> None:
    predictor = native.Predictor(1)
    observe(predictor, 1, MS, 50)
    observe(predictor, 1, 1_000 * MS)
    assert predictor.prediction.l50_ns[0] <= 1.2 * MS


def test_a_model_that_became_slower_is_believed_within_a_few_runs() -> None:
    predictor = native.Predictor(1)
    observe(predictor, 1, MS, 100)
    observe(predictor, 1, 10 * MS, 30)
    assert predictor.prediction.l50_ns[0] >= 7 * MS


def test_a_size_that_does_not_run_while_others_do_is_forgotten() -> None:
    predictor = native.Predictor(2)
    observe(predictor, 2, 800 * MS, 100)
    for second in range(1, 10):
        observe(predictor, 1, MS, 20, NOW + second * 1_000 * MS)
    assert predictor.measured_l50_ns[1] == 0
    assert predictor.prediction.l50_ns[1] == MS


def test_little_traffic_is_no_reason_to_forget() -> None:
    predictor = native.Predictor(2)
    observe(predictor, 2, 2 * MS, 60)
    for second in range(1, 10):
        observe(predictor, 1, MS, 1, NOW + second * 1_000 * MS)
    assert predictor.measured_l50_ns[1] == 2 * MS


def test_a_probe_that_proves_the_prediction_wrong_starts_the_curve_anew() -> None:
    predictor = native.Predictor(4)
    observe(predictor, 4, 900 * MS, 60)
    predictor.observe(1, MS, NOW, probe=True)
    assert predictor.prediction.l50_ns == (MS, MS, MS)
    assert predictor.prediction.trusted


def test_a_probe_that_confirms_the_prediction_changes_nothing_else() -> None:
    predictor = native.Predictor(4)
    observe(predictor, 4, 900 * MS, 60)
    predictor.observe(1, 225 * MS, NOW, probe=True)
    assert predictor.measured_l50_ns == (225 * MS, 0, 900 * MS)


def test_the_cap_gives_way_to_a_model_that_does_not_keep_its_predictions_and_comes_back() -> None:
    predictor = native.Predictor(64, 1_000 * MS)
    for size in sizes_of(64):
        observe(predictor, size, 10 * MS + size * MS // 10, 50)
    assert predictor.prediction.cap == 64
    now_ns = NOW
    for _ in range(3):
        for n in range(100):
            predictor.observe(64, 8 * MS if n % 2 else 30 * MS, now_ns)
        now_ns += 1_000 * MS
        predictor.observe(64, 16 * MS, now_ns)
    assert predictor.cap_cuts > 0
    cut = predictor.prediction.cap
    assert predictor.prediction.knee <= cut < 64
    for _ in range(30):
        observe(predictor, 64, 16 * MS, 101, now_ns)
        now_ns += 1_000 * MS
    assert predictor.prediction.cap == 64


@given(observations)
def test_reset_makes_it_as_new(seen: list[tuple[int, int, int, bool]]) -> None:
    used, new = native.Predictor(8, 20 * MS), native.Predictor(8, 20 * MS)
    for rows, run_ns, _, probe in seen:
        used.observe(rows, run_ns, NOW, probe=probe)
    used.reset()
    assert used.prediction == new.prediction
    for rows, run_ns, _, probe in seen:
        used.observe(rows, run_ns, NOW, probe=probe)
        new.observe(rows, run_ns, NOW, probe=probe)
    assert used.prediction == new.prediction
