"""The counters of the native core, under the labels that people know: model and version -> ModelStatistics and metrics.

A native version counts from its load to its end. What operators look at is a model's version, which may be loaded many
times: a reload puts a new native version under the same name while the old one still finishes what it took. The ledger
adds them up, so that a count never goes back and none is lost: a version that is loaded again goes on where it was.

Durations are sums in nanoseconds. `success` and `fail` count requests from their arrival, `queue` and `compute_*` the
successful requests' shares; `inference_count` counts rows and `execution_count` batches.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from protos.gen import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from server._native import BatchStatistics, Histogram, VersionStatistics
    from server.placement import Placement

# Versions whose counts are kept after they are gone. Names may come from clients (loads with files), so there is an
# end; beyond it the longest gone is forgotten, and would begin at 0 if it came back.
MOST_KEPT = 1024

# How long a version that is gone is still shown by /metrics: scrapers that look once a minute see its last counts.
SHOWN_S = 300.0


class Counts(Protocol):
    """What is used of a native version."""

    def statistics(self) -> VersionStatistics:
        """Its counters."""


class LedgerRow(NamedTuple):
    """One version's counts over all its loads."""

    model: str
    version: str
    counts: VersionStatistics


@dataclass(slots=True)
class _Account:
    live: list[Counts] = field(default_factory=list)
    past: VersionStatistics | None = None
    closed_at: float = 0.0

    def total(self) -> VersionStatistics:
        counts = [one.statistics() for one in self.live]
        return added([self.past, *counts] if self.past is not None else counts)


class Ledger:
    """Adds up the counters of versions. Any thread; the lock is held while native counters are summed, which takes
    microseconds and never waits for anybody."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, most_kept: int = MOST_KEPT) -> None:
        self._clock = clock
        self._most_kept = most_kept
        self._lock = threading.Lock()
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._forgotten_shed: dict[str, Counter[str]] = {}  # model -> what forgotten versions of it had shed

    def open(self, model: str, version: str, native: Counts) -> None:
        """From now on `native` counts under these labels."""
        with self._lock:
            self._accounts.setdefault((model, version), _Account()).live.append(native)

    def close(self, model: str, version: str, native: Counts) -> None:
        """`native` counts no more: what it has counted stays. REQUIRES: opened, and not closed yet."""
        with self._lock:
            account = self._accounts[model, version]
            account.live.remove(native)
            last = native.statistics()._replace(pending=0)
            account.past = last if account.past is None else added([account.past, last])
            account.closed_at = self._clock()
            self._forget()

    def total(self, model: str, version: str) -> VersionStatistics | None:
        """One version's counts; None when it never served, or was forgotten."""
        with self._lock:
            account = self._accounts.get((model, version))
            return None if account is None else account.total()

    def rows(self) -> list[LedgerRow]:
        """The counts of every version that serves, drains, or has been gone for less than SHOWN_S; sorted."""
        with self._lock:
            since = self._clock() - SHOWN_S
            return [
                LedgerRow(model, version, account.total())
                for (model, version), account in sorted(self._accounts.items())
                if account.live or account.closed_at > since
            ]

    def shed(self) -> dict[str, dict[str, int]]:
        """Model -> reason -> requests turned away for want of room or time, over all its versions, sorted by model."""
        with self._lock:
            sums: dict[str, Counter[str]] = {}
            for (model, _), account in sorted(self._accounts.items()):
                sums.setdefault(model, Counter(self._forgotten_shed.get(model))).update(account.total().shed)
            return {model: dict(counter) for model, counter in sums.items()}

    def _forget(self) -> None:
        gone = [key for key, account in self._accounts.items() if not account.live]
        if len(gone) <= self._most_kept:
            return
        model, version = min(gone, key=lambda key: self._accounts[key].closed_at)
        shed = self._accounts.pop((model, version)).total().shed
        if any(other == model for other, _ in self._accounts):
            self._forgotten_shed.setdefault(model, Counter()).update(shed)
        else:
            self._forgotten_shed.pop(model, None)


def added(counts: Iterable[VersionStatistics]) -> VersionStatistics:
    """The sum of counters of the same shape. REQUIRES: at least one."""
    first, *others = counts
    if not others:
        return first
    everything = (first, *others)
    return first._replace(
        last_inference_ms=max(one.last_inference_ms for one in everything),
        success_count=sum(one.success_count for one in everything),
        success_ns=sum(one.success_ns for one in everything),
        fail_count=sum(one.fail_count for one in everything),
        fail_ns=sum(one.fail_ns for one in everything),
        queue_count=sum(one.queue_count for one in everything),
        queue_ns=sum(one.queue_ns for one in everything),
        compute_input_ns=sum(one.compute_input_ns for one in everything),
        compute_infer_ns=sum(one.compute_infer_ns for one in everything),
        compute_output_ns=sum(one.compute_output_ns for one in everything),
        inference_count=sum(one.inference_count for one in everything),
        execution_count=sum(one.execution_count for one in everything),
        bytes_gathered=sum(one.bytes_gathered for one in everything),
        bisections=sum(one.bisections for one in everything),
        pending=sum(one.pending for one in everything),
        failures=_per_name(one.failures for one in everything),
        shed=_per_name(one.shed for one in everything),
        batches=_batches(one.batches for one in everything),
        request_duration=_histogram([one.request_duration for one in everything]),
        queue_duration=_histogram([one.queue_duration for one in everything]),
        batch_rows=_histogram([one.batch_rows for one in everything]),
    )


def _per_name(counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    sums: Counter[str] = Counter()
    for one in counts:
        sums.update(one)
    return dict(sums)


def _batches(counts: Iterable[tuple[BatchStatistics, ...]]) -> tuple[BatchStatistics, ...]:
    by_size: dict[int, BatchStatistics] = {}
    for one in (batch for batches in counts for batch in batches):
        seen = by_size.get(one.batch_size)
        by_size[one.batch_size] = (
            one
            if seen is None
            else one._replace(
                count=one.count + seen.count,
                compute_input_ns=one.compute_input_ns + seen.compute_input_ns,
                compute_infer_ns=one.compute_infer_ns + seen.compute_infer_ns,
                compute_output_ns=one.compute_output_ns + seen.compute_output_ns,
            )
        )
    return tuple(by_size[size] for size in sorted(by_size))


def _histogram(histograms: list[Histogram]) -> Histogram:
    buckets = zip(*(one.counts for one in histograms), strict=True)
    return histograms[0]._replace(
        counts=tuple(sum(bucket) for bucket in buckets), sum=sum(one.sum for one in histograms)
    )


def model_statistics(placement: Placement, counted: VersionStatistics) -> pb.ModelStatistics:
    """The statistics of one loaded version."""
    n_success = counted.success_count
    return pb.ModelStatistics(
        name=placement.name,
        version=placement.version,
        last_inference=counted.last_inference_ms,
        inference_count=counted.inference_count,
        execution_count=counted.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(n_success, counted.success_ns),
            fail=_duration(counted.fail_count, counted.fail_ns),
            queue=_duration(counted.queue_count, counted.queue_ns),
            compute_input=_duration(n_success, counted.compute_input_ns),
            compute_infer=_duration(n_success, counted.compute_infer_ns),
            compute_output=_duration(n_success, counted.compute_output_ns),
            # No response cache: sent as zeros because clients print them.
            cache_hit=_duration(0, 0),
            cache_miss=_duration(0, 0),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=batch.batch_size,
                compute_input=_duration(batch.count, batch.compute_input_ns),
                compute_infer=_duration(batch.count, batch.compute_infer_ns),
                compute_output=_duration(batch.count, batch.compute_output_ns),
            )
            for batch in counted.batches
            if batch.count
        ],
        memory_usage=[_memory(placement)],
    )


def _duration(count: int, ns: int) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=ns)


def _memory(placement: Placement) -> pb.MemoryUsage:
    """The version's memory under the device of its first instance group.

    What is measured is one sum; it is not split between the devices of a version that has several.
    """
    device = placement.settings.instance_groups[0].session.device_id
    return pb.MemoryUsage(type="CPU" if device < 0 else "GPU", id=max(device, 0), byte_size=placement.memory_bytes)
