"""The models that are served: valid, of the promised size, and telling when they should tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from loadtests import calibrate, models, rig
from loadtests.bare_runtime import run_seconds, session_of


def answer(model: onnx.ModelProto, x: npt.NDArray[np.float32], folder: Path) -> npt.NDArray[np.float32]:
    file = folder / "model.onnx"
    onnx.save(model, file)
    return rig.expected_answer(file, x)


def test_identity_and_plus_answer_as_they_say(tmp_path: Path) -> None:
    x = rig.random_rows(3, 16)
    assert np.array_equal(answer(models.identity(), x, tmp_path), x)
    assert np.array_equal(answer(models.plus(5), x, tmp_path), x + np.float32(5))


def test_the_mlp_is_64_256_256_10(tmp_path: Path) -> None:
    assert answer(models.mlp(), rig.random_rows(2, 64), tmp_path).shape == (2, 10)
    weights = {tuple(tensor.dims) for tensor in models.mlp().graph.initializer if len(tensor.dims) == 2}
    assert weights == {(64, 256), (256, 256), (256, 10)}


def test_a_stack_answers_rows_alike_in_any_batch_and_stays_in_range(tmp_path: Path) -> None:
    x = rig.random_rows(4, 16)
    together = answer(models.stack(40), x, tmp_path)
    alone = np.concatenate([answer(models.stack(40), x[i : i + 1], tmp_path) for i in range(4)])
    assert np.allclose(together, alone, rtol=1e-3, atol=1e-4)
    assert 1e-3 < np.abs(together).max() < 1e3


def test_an_image_is_602112_bytes_and_answers_its_means(tmp_path: Path) -> None:
    x = rig.random_rows(1, 3, 224, 224)
    assert x.nbytes == 602_112
    assert np.allclose(answer(models.image(), x, tmp_path), x.mean(axis=(2, 3)), atol=1e-4)


def test_the_big_model_has_some_90_mb_and_its_answer_tells_its_bias(tmp_path: Path) -> None:
    x = rig.random_rows(1, 16)
    one, other = (answer(models.big(bias), x, tmp_path) for bias in (0.25, 0.75))
    assert 85e6 < (tmp_path / "model.onnx").stat().st_size < 95e6
    assert np.abs(one - other).max() > 0.01 * np.abs(one).max()


def test_a_version_folder_appears_complete(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    folder = models.put(repository, "m", models.identity(), version="3", config="max_batch_size: 8\n")
    assert folder == repository / "m" / "3"
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "models/m/3/model.onnx",
        "models/m/config.pbtxt",
    ]


def test_bare_runtime_times_a_run(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(models.mlp(), file)
    wall, cpu = run_seconds(session_of(str(file)), rows=4, seconds=0.05)
    assert 0 < wall < 1
    assert 0 < cpu < 1


@pytest.mark.parametrize(
    ("layers", "took", "wanted", "expected"), [(10, 100.0, 200.0, 20), (10, 100.0, 1.0, 1), (10, 1.0, 1e6, 400)]
)
def test_layers_follow_the_time_within_bounds(layers: int, took: float, wanted: float, expected: int) -> None:
    assert calibrate.next_layers(layers, took, wanted) == expected
