"""Models that take a set time on this machine: how many layers of models.stack that needs is measured, not assumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from loadtests import models
from loadtests.rig import bare_runtime

FIRST_LAYERS = 10
MOST_LAYERS = 400
# A row's time is not quite in proportion to the layers (caches): a second look at the first answer corrects it.
LOOKS = 2


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A model and what it takes on the server's core, by bare ONNX Runtime with one thread."""

    model: onnx.ModelProto
    layers: int
    batch: int
    run_us: float

    @property
    def row_us(self) -> float:
        """us per row at `batch`."""
        return self.run_us / self.batch


def stack_taking(run_us: float, batch: int, folder: Path, seconds: float = 0.5) -> Calibrated:
    """The stack whose run of `batch` rows takes about `run_us`; leaves nothing in `folder`.

    What it really takes is in the answer. A model has at least one layer, so very short runs are out of reach.
    """
    layers, file = FIRST_LAYERS, folder / "calibrate.onnx"
    for _ in range(LOOKS):
        took = _run_us(layers, batch, file, seconds)
        layers = next_layers(layers, took, run_us)
    took = _run_us(layers, batch, file, seconds)
    file.unlink()
    return Calibrated(models.stack(layers), layers, batch, took)


def _run_us(layers: int, batch: int, file: Path, seconds: float) -> float:
    onnx.save(models.stack(layers), file)
    # CPU time: whatever else ran on the core meanwhile is no part of it.
    return bare_runtime(file, [batch], seconds)["cpu_us"][batch]


def next_layers(layers: int, took_us: float, wanted_us: float) -> int:
    """How many layers would have taken `wanted_us`, when `layers` of them took `took_us`."""
    return min(MOST_LAYERS, max(1, round(layers * wanted_us / took_us)))
