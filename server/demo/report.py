"""What the demo found, as a value: the figures, the checks that decide the exit code, the table a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table

Latency = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Classified:
    """All held-out images asked once of one version."""

    version: str
    images: int
    sent: int
    answered: int
    own: int  # answers with the request's id and exactly the recorded prediction
    failed: int
    correct: int  # against the true labels
    expected_correct: int  # the same, recorded when the data was made
    served_by: tuple[str, ...]  # versions that the answers named


@dataclass(frozen=True, slots=True)
class Loaded:
    """A closed-loop load on one version."""

    clients: int
    seconds: float
    sent: int
    answered: int
    own: int
    failed: int
    per_s: float
    latency_ms: Latency
    server_counted: int  # growth of nv_inference_request_success meanwhile


@dataclass(frozen=True, slots=True)
class Swapped:
    """Version 2 loaded while a closed-loop load goes on."""

    sent: int
    answered: int
    own: int
    failed: int
    load_s: float  # RepositoryModelLoad: load, optimise, warm up, move the route
    versions_before: Mapping[str, int]  # requests answered before the load began, by the version that answered
    versions_during: Mapping[str, int]
    versions_after: Mapping[str, int]  # requests sent after the load was reported done
    latency_before_ms: Latency
    latency_during_ms: Latency
    latency_after_ms: Latency
    ready_at_the_end: tuple[str, ...]  # versions that RepositoryIndex calls READY


@dataclass(frozen=True, slots=True)
class Story:
    """The whole run."""

    server_started_s: float
    classified: tuple[Classified, Classified]
    loaded: Loaded
    swapped: Swapped
    server_counted_version_2: int  # nv_inference_request_success of version 2 at the end
    answered_by_version_2: int  # answers that named version 2, over all phases
    rows_per_batch: float  # version 2
    exit_status: int | None
    errors: tuple[str, ...]  # the first few failures, as the clients saw them


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold, with what was seen."""

    name: str
    ok: bool
    seen: str


def checks(story: Story) -> list[Check]:
    """Everything that must hold for exit code 0."""
    found = []
    for part in story.classified:
        found += [
            Check(
                f"version {part.version}: every image answered once with the recorded prediction",
                part.failed == 0 and part.sent == part.answered == part.own == part.images,
                f"{part.own} of {part.images}, {part.failed} failed",
            ),
            Check(
                f"version {part.version}: accuracy as recorded",
                part.correct == part.expected_correct and part.served_by == (part.version,),
                f"{part.correct} correct, recorded {part.expected_correct}, served by {', '.join(part.served_by)}",
            ),
        ]
    first, second = story.classified
    load, swap = story.loaded, story.swapped
    found += [
        Check(
            "version 2 is better than version 1",
            second.correct > first.correct,
            f"{second.correct} against {first.correct} correct",
        ),
        Check(
            "load: every request answered once, with its own answer",
            load.sent > 0 and load.failed == 0 and load.sent == load.answered == load.own,
            f"{load.own} of {load.sent}, {load.failed} failed",
        ),
        Check(
            "load: server and clients count the same",
            load.server_counted == load.answered,
            f"server {load.server_counted}, clients {load.answered}",
        ),
        Check("swap: requests failed", swap.failed == 0, str(swap.failed)),
        Check(
            "swap: every request answered once, with its own answer",
            swap.sent > 0 and swap.sent == swap.answered == swap.own,
            f"{swap.own} of {swap.sent}",
        ),
        Check(
            "swap: version 1 answered until the load, version 2 afterwards",
            set(swap.versions_before) == {"1"}
            and set(swap.versions_after) == {"2"}
            and set(swap.versions_during) <= {"1", "2"},
            f"before {dict(swap.versions_before)}, during {dict(swap.versions_during)}, "
            f"after {dict(swap.versions_after)}",
        ),
        Check(
            "swap: version 2 alone is READY at the end",
            swap.ready_at_the_end == ("2",),
            ", ".join(swap.ready_at_the_end) or "none",
        ),
        Check(
            "version 2: server and clients count the same",
            story.server_counted_version_2 == story.answered_by_version_2,
            f"server {story.server_counted_version_2}, clients {story.answered_by_version_2}",
        ),
        Check("the server ended by itself with status 0", story.exit_status == 0, str(story.exit_status)),
    ]
    return found


def as_document(story: Story) -> dict[str, Any]:
    """The story and its checks as one JSON document."""
    verdict = checks(story)
    return {"ok": all(check.ok for check in verdict), **asdict(story), "checks": [asdict(check) for check in verdict]}


def tables(story: Story) -> list[RenderableType]:
    """The figures and the checks, for people."""
    figures = Table(title="One model, two versions, real handwritten digits", title_justify="left")
    for heading in ("", "version 1", "while 2 was loading", "version 2"):
        figures.add_column(heading, justify="left" if heading == "" else "right")
    first, second = story.classified
    swap = story.swapped

    def latency(key: str) -> list[str]:
        phases = (swap.latency_before_ms, swap.latency_during_ms, swap.latency_after_ms)
        return [f"{phase[key]:.2f} ms" if phase["count"] else "-" for phase in phases]

    figures.add_row("accuracy on held-out images", _accuracy(first), "", _accuracy(second))
    figures.add_row("requests answered under load", *(str(int(n)) for n in _counts(swap)))
    figures.add_row("requests failed", str(story.loaded.failed), str(swap.failed), "0" if not second.failed else "some")
    figures.add_row("latency p50", *latency("p50"))
    figures.add_row("latency p99", *latency("p99"))
    figures.add_row("latency, largest", *latency("max"))

    verdict = Table(title="Checked", title_justify="left", show_header=False)
    verdict.add_column()
    verdict.add_column()
    verdict.add_column()
    for check in checks(story):
        verdict.add_row("[green]ok[/]" if check.ok else "[bold red]NOT OK[/]", check.name, check.seen)
    return [figures, verdict]


def _accuracy(part: Classified) -> str:
    return f"{100 * part.correct / part.images:.2f} % ({part.correct}/{part.images})"


def _counts(swap: Swapped) -> tuple[float, float, float]:
    return swap.latency_before_ms["count"], swap.latency_during_ms["count"], swap.latency_after_ms["count"]
