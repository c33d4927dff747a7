"""Results as values: goals that are judged, the JSON of one scenario, the table of a whole run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Of the cores' time. Above this, figures of a run are shown with a warning.
MOST_OTHERS_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure against what it should be. `relation` is ">=", "<=" or "=="; `stretch` is the target after that."""

    name: str
    value: float
    relation: str
    target: float
    note: str = ""
    stretch: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the goal is met; never for a value that is no number."""
        return _holds(self.value, self.relation, self.target)

    @property
    def is_stretch_met(self) -> bool:
        """Whether the value is as good as `stretch`; False without one."""
        return self.stretch is not None and _holds(self.value, self.relation, self.stretch)


def _holds(value: float, relation: str, target: float) -> bool:
    if relation == ">=":
        return value >= target
    if relation == "<=":
        return value <= target
    if relation == "==":
        return value == target
    raise ValueError(f"unknown relation {relation!r}")


@dataclass(frozen=True, slots=True)
class Result:
    """What a scenario found."""

    goals: Sequence[Goal]
    figures: Mapping[str, Any]  # what the README may quote
    raw: Any = field(default_factory=dict)  # every round

    @property
    def ok(self) -> bool:
        """Whether every goal is met; never without one."""
        return bool(self.goals) and all(goal.ok for goal in self.goals)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a result comes from: the scenario, when it ran and how, on which machine."""

    scenario: str
    question: str
    when: str
    machine: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def document(origin: Origin, result: Result) -> dict[str, Any]:
    """The JSON of a scenario that finished."""
    return {
        **asdict(origin),
        "ok": result.ok,
        "goals": [{**asdict(goal), "ok": goal.ok, "is_stretch_met": goal.is_stretch_met} for goal in result.goals],
        "figures": dict(result.figures),
        "raw": result.raw,
    }


def failure(origin: Origin, error: str) -> dict[str, Any]:
    """The JSON of a scenario that did not finish. The table shows the last line of `error`, the JSON all of it."""
    text = error.strip() or "unknown"
    return {**asdict(origin), "ok": False, "error": text, "goals": [], "figures": {}, "raw": {}}


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """The table of a run: one line per goal, then where each was measured."""
    lines = ["| scenario | goal | value | should be | met |", "|---|---|---|---|---|"]
    for one in documents:
        if "error" in one:
            why = one["error"].splitlines()[0].replace("|", "/")
            lines.append(f"| {one['scenario']} | did not finish: {why} | - | - | **no** |")
        lines += [f"| {one['scenario']} | {_goal_cells(goal)} |" for goal in one["goals"]]
    measured: dict[str, list[str]] = {}
    for one in documents:
        measured.setdefault(_where(one), []).append(one["scenario"])
    for where, scenarios in measured.items():
        which = "" if len(measured) == 1 else f"{', '.join(scenarios)}: "
        lines += ["", f"{which}{where}"]
    for busy in filter(None, map(_busy, documents)):
        lines += ["", busy]
    return "\n".join(lines) + "\n"


def _goal_cells(goal: Mapping[str, Any]) -> str:
    note = f" ({goal['note']})" if goal["note"] else ""
    should_be = f"{goal['relation']} {number(goal['target'])}"
    met = "yes" if goal["ok"] else "**no**"
    if goal.get("stretch") is not None:
        should_be += f", stretch {number(goal['stretch'])}"
        met += ", stretch too" if goal["is_stretch_met"] else ""
    return f"{goal['name']}{note} | {number(goal['value'])} | {should_be} | {met}"


def _where(one: Mapping[str, Any]) -> str:
    machine = one["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    quick = "; a quick run, which shows that it works and not how fast" if one["options"].get("quick") else ""
    return (
        f"{one['when']}, commit {machine['commit']}{changed}; {machine['cpu']}, {machine['cores']} cores, "
        f"Linux {machine['kernel']}; Python {machine['python']}, {packages}{quick}."
    )


def _busy(one: Mapping[str, Any]) -> str:
    """A warning about what else the machine did, or ""."""
    share = one.get("others_cpu_share", 0.0)
    if share < MOST_OTHERS_SHARE:
        return ""
    return (
        f"{one['scenario']}: other processes used {100 * share:.0f} % of the cores meanwhile; its figures are in doubt."
    )


def number(value: float) -> str:
    """A figure as people read it: three significant digits below 1,000, whole numbers above."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Writes one JSON result and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_summary(folder: Path, date: str, suffix: str, scenarios: Sequence[str]) -> Path:
    """Writes <date>-summary<suffix>.md over all results of that day, in the order of `scenarios`; returns its path.

    A scenario that is run again alone takes the place of its older result and leaves the others in the table.
    """
    files = [folder / f"{date}-{name}{suffix}.json" for name in scenarios]
    documents = [json.loads(file.read_text()) for file in files if file.exists()]
    path = folder / f"{date}-summary{suffix}.md"
    path.write_text(markdown(documents))
    return path
