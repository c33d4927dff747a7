"""Results as values: goals that are judged, the JSON of one scenario, the table of a whole run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure against what it should be. `relation` is ">=", "<=" or "=="."""

    name: str
    value: float
    relation: str
    target: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the goal is met; never for a value that is no number."""
        if self.relation == ">=":
            return self.value >= self.target
        if self.relation == "<=":
            return self.value <= self.target
        if self.relation == "==":
            return self.value == self.target
        raise ValueError(f"unknown relation {self.relation!r}")


@dataclass(frozen=True, slots=True)
class Result:
    """What a scenario found."""

    goals: Sequence[Goal]
    figures: Mapping[str, Any]  # what the README may quote
    raw: Any = field(default_factory=dict)  # every round

    @property
    def ok(self) -> bool:
        """Whether every goal is met."""
        return all(goal.ok for goal in self.goals)


def document(
    scenario: str, question: str, result: Result, machine: Mapping[str, Any], when: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON of one scenario."""
    return {
        "scenario": scenario,
        "question": question,
        "when": when,
        "options": dict(options),
        "ok": result.ok,
        "goals": [{**asdict(goal), "ok": goal.ok} for goal in result.goals],
        "figures": dict(result.figures),
        "machine": dict(machine),
        "raw": result.raw,
    }


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """The table of a run: one line per goal, then where it was measured."""
    lines = ["| scenario | goal | value | should be | met |", "|---|---|---|---|---|"]
    for one in documents:
        if "error" in one:
            lines.append(f"| {one['scenario']} | did not finish: {one['error']} | - | - | **no** |")
            continue
        for goal in one["goals"]:
            note = f" ({goal['note']})" if goal["note"] else ""
            lines.append(
                f"| {one['scenario']} | {goal['name']}{note} | {number(goal['value'])} | "
                f"{goal['relation']} {number(goal['target'])} | {'yes' if goal['ok'] else '**no**'} |"
            )
    if documents:
        machine, when = documents[0]["machine"], documents[0]["when"]
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
        lines += [
            "",
            f"{when}, commit {machine['commit']}{changed}; {machine['cpu']}, {machine['cores']} cores, "
            f"Linux {machine['kernel']}; Python {machine['python']}, {packages}.",
        ]
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """A figure as people read it: three significant digits below 1,000, whole numbers above."""
    if value != value or value in (float("inf"), float("-inf")):
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
