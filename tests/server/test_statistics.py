"""Counters under the labels that people know, over loads, reloads and ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.loader import LoadedVersion
from server.placement import Placement
from server.settings import BatchSettings, InstanceGroup, ModelSettings, SessionSettings
from server.statistics import SHOWN_S, Ledger, added, model_statistics
from tests.server import fakes
from tests.server.fakes import BatchStatistics, Histogram, ManualClock, counts, counts_of


class Native:
    """A native version as far as it counts."""

    def __init__(self, n_requests: int = 0) -> None:
        self.counts = counts_of(n_requests)

    def statistics(self) -> fakes.VersionStatistics:
        return self.counts


def success(ledger: Ledger, model: str = "a", version: str = "1") -> int | None:
    total = ledger.total(model, version)
    return None if total is None else total.success_count


def test_a_version_counts_from_its_load() -> None:
    ledger = Ledger()
    assert success(ledger) is None
    native = Native()
    ledger.open("a", "1", native)
    assert success(ledger) == 0
    native.counts = counts_of(3)
    assert success(ledger) == 3
    assert [row[:2] for row in ledger.rows()] == [("a", "1")]


def test_two_native_versions_under_one_name_are_added_up() -> None:
    ledger = Ledger()
    old, new = Native(10), Native(1)
    ledger.open("a", "1", old)
    ledger.open("a", "1", new)
    assert success(ledger) == 11
    old.counts = counts_of(12)
    ledger.close("a", "1", old)
    old.counts = counts_of(99)  # nobody looks any more
    assert success(ledger) == 13
    ledger.close("a", "1", new)
    ledger.open("a", "1", Native(5))
    assert success(ledger) == 18


def test_what_waits_in_a_freed_version_is_nothing() -> None:
    ledger = Ledger()
    native = Native()
    native.counts = counts(pending=4)
    ledger.open("a", "1", native)
    assert ledger.rows()[0].counts.pending == 4
    ledger.close("a", "1", native)
    assert ledger.rows()[0].counts.pending == 0


def test_a_version_that_is_gone_is_shown_for_a_while_and_remembered_longer() -> None:
    clock = ManualClock()
    ledger = Ledger(clock)
    native = Native(7)
    ledger.open("a", "1", native)
    clock.advance(1e6)
    assert ledger.rows()
    ledger.close("a", "1", native)
    clock.advance(SHOWN_S - 1)
    assert [row.counts.success_count for row in ledger.rows()] == [7]
    clock.advance(1)
    assert ledger.rows() == []
    ledger.open("a", "1", Native(1))
    assert success(ledger) == 8


def test_the_longest_gone_is_forgotten_first() -> None:
    clock = ManualClock()
    ledger = Ledger(clock, most_kept=2)
    for version in ("1", "2", "3"):
        native = Native(1)
        ledger.open("a", version, native)
        clock.advance(1)
        ledger.close("a", version, native)
    assert [success(ledger, "a", version) for version in ("1", "2", "3")] == [None, 1, 1]


def test_shed_is_a_sum_over_versions_and_never_goes_back() -> None:
    ledger = Ledger(most_kept=1)
    seen = []
    for version in ("1", "2", "3", "4"):
        native = Native()
        native.counts = counts(shed={"QUEUE_FULL": 2, "TOO_LATE": 0, "DEADLINE_PASSED": 1})
        ledger.open("a", version, native)
        seen.append(ledger.shed()["a"])
        if version != "4":
            ledger.close("a", version, native)
    assert [one["QUEUE_FULL"] for one in seen] == [2, 4, 6, 8]
    assert seen[-1] == {"QUEUE_FULL": 8, "TOO_LATE": 0, "DEADLINE_PASSED": 4}


def test_a_forgotten_model_leaves_nothing_behind() -> None:
    clock = ManualClock()
    ledger = Ledger(clock, most_kept=1)
    for model in ("a", "a2", "a3"):
        native = Native(1)
        ledger.open(model, "1", native)
        clock.advance(1)
        ledger.close(model, "1", native)
    assert list(ledger.shed()) == ["a3"]
    assert ledger._forgotten_shed == {}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_a_sum_of_counters_is_the_counter_of_the_sum(requests: list[int]) -> None:
    total = added([counts_of(n) for n in requests])
    expected = counts_of(sum(requests))
    assert total.last_inference_ms == 1_700_000_000_000 + max(requests)
    assert total.request_duration.sum == pytest.approx(expected.request_duration.sum)
    for name in set(total._fields) - {"last_inference_ms", "request_duration", "queue_duration"}:
        assert getattr(total, name) == getattr(expected, name), name


def test_batches_of_different_sizes_stay_apart() -> None:
    one = counts(batches=(BatchStatistics(1, 5, 1, 2, 3), BatchStatistics(4, 1, 1, 1, 1)))
    other = counts(batches=(BatchStatistics(2, 7, 7, 7, 7), BatchStatistics(4, 2, 10, 20, 30)))
    assert added([one, other]).batches == (
        BatchStatistics(1, 5, 1, 2, 3),
        BatchStatistics(2, 7, 7, 7, 7),
        BatchStatistics(4, 3, 11, 21, 31),
    )


def test_histograms_of_other_bounds_are_never_added() -> None:
    other = counts(batch_rows=Histogram((1.0,), (0, 0), 0.0))
    with pytest.raises(ValueError, match="zip"):
        added([counts(), other])


NUMBERS = [name for name in fakes.VersionStatistics._fields if isinstance(getattr(counts(), name), int)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_counter_of_the_native_core_is_added(name: str) -> None:
    total = added([counts(**{name: 3}), counts(**{name: 4}), counts()])
    assert getattr(total, name) == (4 if name == "last_inference_ms" else 7)


def test_counters_by_name_are_added() -> None:
    one = counts(failures={"REJECTED": 1, "OTHER": 2}, shed={"QUEUE_FULL": 5})
    total = added([one, one])
    assert (total.failures, total.shed) == ({"REJECTED": 2, "OTHER": 4}, {"QUEUE_FULL": 10})


# -- ModelStatistics ---------------------------------------------------------------------------------------------------


def a_placement(device_id: int = -1) -> Placement:
    class Loaded:
        memory_bytes = 24

    settings = ModelSettings(
        name="a",
        version="1",
        max_batch_size=8,
        inputs=(),
        outputs=(),
        batching=BatchSettings(),
        instance_groups=(InstanceGroup(1, SessionSettings(device_id=device_id)),),
        warmup=(),
    )
    placement = Placement("a", "1")
    placement.hold(LoadedVersion(Loaded(), None, settings, 1000, 0.1))  # type: ignore[arg-type]
    return placement


def test_the_message_has_every_duration_in_nanoseconds() -> None:
    counted = counts_of(4)._replace(fail_count=2, fail_ns=77)
    message = model_statistics(a_placement(), counted)
    assert (message.name, message.version) == ("a", "1")
    assert message.last_inference == 1_700_000_000_004
    assert (message.inference_count, message.execution_count) == (4, 4)
    stats = message.inference_stats
    assert (stats.success.count, stats.success.ns) == (4, 4_000_000)
    assert (stats.fail.count, stats.fail.ns) == (2, 77)
    assert (stats.queue.count, stats.queue.ns) == (4, 400_000)
    assert (stats.compute_input.count, stats.compute_input.ns) == (4, 800_000)
    assert (stats.compute_infer.count, stats.compute_infer.ns) == (4, 2_000_000)
    assert (stats.compute_output.count, stats.compute_output.ns) == (4, 400_000)
    assert stats.HasField("cache_hit")
    assert stats.HasField("cache_miss")
    (batch,) = message.batch_stats
    assert (batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns) == (1, 4, 2_000_000)


def test_sizes_that_never_ran_are_left_out() -> None:
    counted = counts(batches=(BatchStatistics(1, 0, 0, 0, 0), BatchStatistics(2, 1, 1, 1, 1)))
    assert [batch.batch_size for batch in model_statistics(a_placement(), counted).batch_stats] == [2]


@pytest.mark.parametrize(("device_id", "kind", "number"), [(-1, "CPU", 0), (0, "GPU", 0), (3, "GPU", 3)])
def test_memory_is_told_by_device(device_id: int, kind: str, number: int) -> None:
    (usage,) = model_statistics(a_placement(device_id), counts()).memory_usage
    assert (usage.type, usage.id, usage.byte_size) == (kind, number, 1024)
