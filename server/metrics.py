"""Every metric: its name, type, help, labels and where its numbers come from -> the text of /metrics.

The text is written here because Triton's counters, which dashboards ask for, have no `_total`, and client libraries add
one. Numbers are plain decimals, never with an exponent: perf_analyzer would read `1.2e+09` as 1.2.

Counters of a version go on where they were when the version is loaded again (statistics.py); a version that is gone is
shown for five more minutes. A scrape sums the native shards, which their writers never wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from server import host
from server.statistics import LedgerRow

if TYPE_CHECKING:
    from server._native import Histogram, VersionStatistics
    from server.gpus import Gpu
    from server.manager import Manager

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """One line."""

    labels: Labels
    value: float
    suffix: str = ""


class Family(NamedTuple):
    """One metric with all its series."""

    name: str
    kind: str  # counter, gauge, histogram
    help: str
    samples: Iterable[Sample]


# -- text --------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A plain decimal that reads back as the same number."""
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# A scrape takes the core from requests, and a good part of it would go into the same few hundred names each time.
# Room for some 60 versions.
@lru_cache(maxsize=8192)
def _series(name: str, suffix: str, labels: Labels) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
    return f"{name}{suffix}{{{inside}}}" if inside else f"{name}{suffix}"


def exposition(families: Iterable[Family]) -> str:
    """The text format 0.0.4."""
    lines: list[str] = []
    for family in families:
        lines += (f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}")
        for labels, value, suffix in family.samples:
            lines.append(f"{_series(family.name, suffix, labels)} {value if type(value) is int else number(value)}")
    return "\n".join(lines) + "\n"


def histogram(labels: Labels, counted: Histogram) -> Iterator[Sample]:
    """The series of one histogram: cumulative buckets, sum, count."""
    below = 0
    for bound, count in zip((*map(number, counted.bounds), "+Inf"), counted.counts, strict=True):
        below += count
        yield Sample((*labels, ("le", bound)), below, "_bucket")
    yield Sample(labels, counted.sum, "_sum")
    yield Sample(labels, below, "_count")


# -- tables ------------------------------------------------------------------------------------------------------------


class _PerVersion(NamedTuple):
    name: str
    kind: str
    help: str
    value: Callable[[VersionStatistics], int]


# In the order in which Triton writes them. Durations are whole microseconds.
_PER_VERSION = (
    _PerVersion("nv_inference_request_success", "counter", "Requests that were answered", lambda c: c.success_count),
    _PerVersion(
        "nv_inference_count", "counter", "Rows that were run (a batch of n rows counts n)", lambda c: c.inference_count
    ),
    _PerVersion("nv_inference_exec_count", "counter", "Batches that were run", lambda c: c.execution_count),
    _PerVersion(
        "nv_inference_request_duration_us",
        "counter",
        "Microseconds from arrival to answer, summed over answered requests",
        lambda c: c.success_ns // 1000,
    ),
    _PerVersion(
        "nv_inference_queue_duration_us",
        "counter",
        "Microseconds in the queue, summed over answered requests",
        lambda c: c.queue_ns // 1000,
    ),
    _PerVersion(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Microseconds of gathering inputs, summed over answered requests",
        lambda c: c.compute_input_ns // 1000,
    ),
    _PerVersion(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Microseconds in the runtime, summed over answered requests",
        lambda c: c.compute_infer_ns // 1000,
    ),
    _PerVersion(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Microseconds of writing answers, summed over answered requests",
        lambda c: c.compute_output_ns // 1000,
    ),
    _PerVersion("nv_inference_pending_request_count", "gauge", "Requests that wait to be run", lambda c: c.pending),
    _PerVersion(
        "tidegate_bytes_gathered_total",
        "counter",
        "Bytes copied from requests into batch buffers",
        lambda c: c.bytes_gathered,
    ),
    _PerVersion(
        "tidegate_batch_bisections_total",
        "counter",
        "Batches that failed and were run again in halves",
        lambda c: c.bisections,
    ),
)

_FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")

# What of the front end's counters is a state rather than a count.
_FRONTEND_GAUGES = frozenset(("connections_open", "calls_open", "requests_live", "inflight_bytes"))

_FRONTEND_HELP: Mapping[str, str] = {
    "connections_accepted": "Connections accepted",
    "connections_refused": "Connections closed at once because there were too many",
    "connections_open": "Connections open now",
    "accept_errors": "Failures to accept a connection",
    "calls": "Calls begun, of any method",
    "calls_open": "Calls open now",
    "bytes_read": "Bytes read from sockets",
    "bytes_written": "Bytes written to sockets",
    "bytes_received": "Bytes of messages copied out of read buffers",
    "writes": "Writes to sockets",
    "te_missing": "Calls without the te header that the protocol asks for",
    "protocol_errors": "Connections ended for breaking HTTP/2",
    "glitch_closes": "Connections ended for frames that do nothing",
    "ping_closes": "Connections ended for too many pings",
    "stall_closes": "Connections ended because the client did not read",
    "stall_resets": "Calls ended because the client did not read or send",
    "handshake_closes": "Connections ended before they said anything",
    "keepalive_closes": "Connections ended because a keepalive ping was not answered",
    "http_refusals": "Requests that are not gRPC",
    "resets_received": "Calls that the client reset",
    "deadline_expired": "Calls whose deadline passed",
    "requests_live": "Request objects in use now",
    "inflight_bytes": "Bytes of messages held now",
}

_GPU_GAUGES: tuple[tuple[str, str, str, Callable[[Gpu], float]], ...] = (
    ("nv_gpu_utilization", "gauge", "GPU utilization, 0 to 1", lambda gpu: gpu.utilization),
    ("nv_gpu_memory_total_bytes", "gauge", "GPU memory", lambda gpu: gpu.memory_total),
    ("nv_gpu_memory_used_bytes", "gauge", "GPU memory in use", lambda gpu: gpu.memory_used),
    ("nv_gpu_power_usage", "gauge", "GPU power draw in watts", lambda gpu: gpu.power_w),
    ("nv_gpu_power_limit", "gauge", "GPU power limit in watts", lambda gpu: gpu.power_limit_w),
    (
        "nv_energy_consumption",
        "counter",
        "Joules used by the GPU since its driver was loaded",
        lambda gpu: gpu.energy_j,
    ),
)


class Metrics:
    """Collects and writes. text() may be called from any thread; it takes no lock that a request takes."""

    def __init__(
        self,
        manager: Manager,
        frontend_counters: Callable[[], Mapping[str, int]],
        live_objects: Callable[[], Mapping[str, int]],
        *,
        versions: Mapping[str, str],
        gpus: Callable[[], list[Gpu]] = list,
        cpu: host.CpuUsage | None = None,
    ) -> None:
        """`versions`: what runs here, as labels of tidegate_build_info."""
        self._manager = manager
        self._frontend_counters = frontend_counters
        self._live_objects = live_objects
        self._versions = dict(versions)
        self._gpus = gpus
        self._cpu = cpu or host.CpuUsage()

    def text(self) -> str:
        """The answer to GET /metrics."""
        return exposition(self.families())

    def families(self) -> Iterator[Family]:
        """Every metric, in order."""
        yield from self._of_versions(self._manager.ledger.rows())
        yield from self._of_models()
        yield from self._of_frontend()
        yield from self._of_machine()

    def _of_versions(self, rows: list[LedgerRow]) -> Iterator[Family]:
        labelled = [((("model", row.model), ("version", row.version)), row.counts) for row in rows]
        for name, kind, text, value in _PER_VERSION:
            yield Family(name, kind, text, [Sample(labels, value(counts)) for labels, counts in labelled])
        yield Family(
            "nv_inference_request_failure",
            "counter",
            "Requests that failed, by reason",
            [
                Sample((*labels, ("reason", reason)), counts.failures.get(reason, 0))
                for labels, counts in labelled
                for reason in _FAILURE_REASONS
            ],
        )
        yield Family(
            "tidegate_request_duration_seconds",
            "histogram",
            "Time from arrival to answer of answered requests",
            [sample for labels, counts in labelled for sample in histogram(labels, counts.request_duration)],
        )
        yield Family(
            "tidegate_queue_duration_seconds",
            "histogram",
            "Time in the queue of answered requests",
            [sample for labels, counts in labelled for sample in histogram(labels, counts.queue_duration)],
        )
        yield Family(
            "tidegate_batch_rows",
            "histogram",
            "Rows of the batches that were run",
            [sample for labels, counts in labelled for sample in histogram(labels, counts.batch_rows)],
        )

    def _of_models(self) -> Iterator[Family]:
        yield Family(
            "tidegate_shed_total",
            "counter",
            "Requests turned away or given up for want of room or time",
            [
                Sample((("model", model), ("reason", reason)), count)
                for model, reasons in self._manager.ledger.shed().items()
                for reason, count in sorted(reasons.items())
            ],
        )
        placements = self._manager.placements()
        labelled = [((("model", one.name), ("version", one.version)), one) for one in placements]
        yield Family(
            "tidegate_model_memory_bytes",
            "gauge",
            "Bytes of a version's weights and of its instances' buffers",
            [Sample(labels, one.memory_bytes) for labels, one in labelled],
        )
        yield Family(
            "nv_model_load_duration_secs",
            "gauge",
            "Seconds that loading and warming up the version took",
            [Sample(labels, one.load_seconds) for labels, one in labelled],
        )

    def _of_frontend(self) -> Iterator[Family]:
        for name, value in self._frontend_counters().items():
            text = _FRONTEND_HELP.get(name, name.replace("_", " ").capitalize())
            if name in _FRONTEND_GAUGES:
                yield Family(f"tidegate_{name}", "gauge", text, [Sample((), value)])
            else:
                yield Family(f"tidegate_{name}_total", "counter", text, [Sample((), value)])
        yield Family(
            "tidegate_live_objects",
            "gauge",
            "Objects of the native core that exist now, by kind",
            [Sample((("kind", kind),), count) for kind, count in sorted(self._live_objects().items())],
        )

    def _of_machine(self) -> Iterator[Family]:
        def one(name: str, kind: str, text: str, value: float) -> Family:
            return Family(name, kind, text, [Sample((), value)])

        gpus = self._gpus()
        for name, kind, text, gpu_value in _GPU_GAUGES if gpus else ():
            yield Family(name, kind, text, [Sample((("gpu_uuid", gpu.uuid),), gpu_value(gpu)) for gpu in gpus])
        yield one("nv_cpu_utilization", "gauge", "CPU utilization of the host, 0 to 1", self._cpu.utilization())
        memory = host.memory()
        yield one("nv_cpu_memory_total_bytes", "gauge", "Memory of the host", memory.total)
        yield one("nv_cpu_memory_used_bytes", "gauge", "Memory of the host in use", memory.used)
        process = host.process()
        yield one("process_cpu_seconds_total", "counter", "CPU time of this process", process.cpu_s)
        yield one("process_resident_memory_bytes", "gauge", "Resident memory of this process", process.resident)
        yield one("process_virtual_memory_bytes", "gauge", "Virtual memory of this process", process.virtual)
        yield one("process_start_time_seconds", "gauge", "When this process started (Unix time)", process.started_s)
        yield one("process_threads", "gauge", "Threads of this process", process.threads)
        yield one("process_open_fds", "gauge", "Open files of this process", process.open_files)
        yield one("process_max_fds", "gauge", "Most files this process may open", process.most_files)
        yield Family(
            "tidegate_build_info", "gauge", "What runs here", [Sample(tuple(sorted(self._versions.items())), 1)]
        )
