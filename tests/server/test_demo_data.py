"""What the demo ships: the recorded predictions are those of the shipped files, and all of it stays small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from server.demo.load import Digits
from server.demo.main import DATA, put_version

MOST_BYTES = 400_000


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_recorded_predictions_are_those_of_the_shipped_model(version: str) -> None:
    digits = Digits.read(DATA / "digits.npz")
    session = onnxruntime.InferenceSession(DATA / f"digits_v{version}.onnx", providers=["CPUExecutionProvider"])
    (labels,) = session.run(["label"], {"image": digits.images})
    assert np.array_equal(labels, digits.expected[version])
    facts = json.loads((DATA / "facts.json").read_text())
    assert int((digits.expected[version] == digits.labels).sum()) == facts["correct"][version]
    assert len(digits.labels) == facts["held_out_images"]


def test_the_versions_differ_on_some_images_so_that_answers_tell_them_apart() -> None:
    digits = Digits.read(DATA / "digits.npz")
    assert int((digits.expected["1"] != digits.expected["2"]).sum()) >= 30


def test_the_data_is_small() -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir()) < MOST_BYTES


def test_a_version_appears_complete(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    repository.mkdir()
    put_version(repository, "1")
    copied = repository / "digits" / "1" / "model.onnx"
    assert copied.read_bytes() == (DATA / "digits_v1.onnx").read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["models"]
