"""Runs of ONNX Runtime through the native instance give what the runtime's own Python package gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from onnx import TensorProto

from server import _native
from server.settings import DataType, SessionSettings
from tests.ext.ort_models import (
    CPU,
    DEVICES,
    NUMPY_TYPES,
    Runner,
    constant,
    identity,
    model,
    node,
    open_session,
    random_array,
    run_package,
    settings_for,
    to_wire,
    value,
)

INT64 = TensorProto.INT64
STRING = TensorProto.STRING


on_every_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


def a_runner(
    made: onnx.ModelProto,
    folder: Path,
    max_batch_size: int = 64,
    device: SessionSettings = CPU,
    **changes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Runner:
    session = open_session(made, folder, device)
    return Runner(session, settings_for(session, max_batch_size, **changes))


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(ours) == len(theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == expected.shape
        # The package gives strings as text.
        texts = [one.encode() for one in expected.ravel()] if expected.dtype == object else None
        assert mine.ravel().tolist() == texts if texts is not None else np.array_equal(mine, expected, equal_nan=True)


# -- data types -------------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("datatype", DataType)
def test_every_data_type_comes_back_as_it_went_in(datatype: DataType, device: SessionSettings, tmp_path: Path) -> None:
    runner = a_runner(identity(datatype.value), tmp_path, device=device)
    random = np.random.default_rng(datatype.value)
    for rows in ([1], [2, 3], [1] * 64, [64]):
        requests = [[random_array(random, datatype, (n, 3))] for n in rows]
        (out,) = runner.run(*requests)
        np.testing.assert_array_equal(out, np.concatenate([request[0] for request in requests]))


@pytest.mark.parametrize("datatype", [t for t in DataType if t not in (DataType.BYTES, DataType.BF16, DataType.BOOL)])
def test_arithmetic_on_every_numeric_type_equals_the_package(datatype: DataType, tmp_path: Path) -> None:
    cast = model(
        [node("Cast", "x", "wide", to=TensorProto.DOUBLE), node("Neg", "wide", "y")],
        [value("x", ["batch", 3], datatype.value)],
        [value("y", ["batch", 3], TensorProto.DOUBLE)],
    )
    x = random_array(np.random.default_rng(1), datatype, (5, 3))
    assert x.dtype == NUMPY_TYPES[datatype]
    assert_same(a_runner(cast, tmp_path).run([x[:2]], [x[2:]]), run_package(cast, [x]))


def test_bfloat16_means_the_upper_half_of_a_float(tmp_path: Path) -> None:
    cast = model(
        [node("Cast", "x", "y", to=TensorProto.FLOAT)],
        [value("x", ["batch", 2], TensorProto.BFLOAT16)],
        [value("y", ["batch", 2])],
    )
    numbers = np.array([[1.0, -2.5], [0.0, 3e38]], np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    (out,) = a_runner(cast, tmp_path).run([bits])
    np.testing.assert_array_equal(out, (bits.astype(np.uint32) << 16).view(np.float32))

    theirs = onnxruntime.InferenceSession(cast.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = theirs.io_binding()
    binding.bind_ortvalue_input(
        "x", onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    )
    binding.bind_output("y")
    theirs.run_with_iobinding(binding)
    assert_same([out], binding.copy_outputs_to_cpu())


def test_half_floats_and_booleans_compute_as_in_the_package(tmp_path: Path) -> None:
    made = model(
        [node("Add", "a b", "sum"), node("Greater", "a b", "more"), node("And", "more flag", "both")],
        [
            value("a", ["batch", 4], TensorProto.FLOAT16),
            value("b", ["batch", 4], TensorProto.FLOAT16),
            value("flag", ["batch", 4], TensorProto.BOOL),
        ],
        [value("sum", ["batch", 4], TensorProto.FLOAT16), value("both", ["batch", 4], TensorProto.BOOL)],
    )
    random = np.random.default_rng(2)
    a, b = (random_array(random, DataType.FP16, (6, 4)) for _ in range(2))
    flag = random_array(random, DataType.BOOL, (6, 4))
    ours = a_runner(made, tmp_path).run([a[:1], b[:1], flag[:1]], [a[1:], b[1:], flag[1:]])
    assert_same(ours, run_package(made, [a, b, flag]))


# -- strings ----------------------------------------------------------------------------------------------------------


@on_every_device
def test_strings_keep_nul_bytes_and_emptiness(device: SessionSettings, tmp_path: Path) -> None:
    runner = a_runner(identity(STRING, ["batch", 2]), tmp_path, device=device)
    first = np.array([[b"", b"a\0b"]], object)
    second = np.array([[b"\0", b"x" * 100], ["é".encode(), b"\xff\xfe"]], object)
    (out,) = runner.run([first], [second])
    assert out.tolist() == [[b"", b"a\0b"], [b"\0", b"x" * 100], ["é".encode(), b"\xff\xfe"]]


def test_strings_are_computed_as_in_the_package(tmp_path: Path) -> None:
    made = model(
        [node("StringConcat", "a b", "joined"), node("Equal", "a b", "same")],
        [value("a", ["batch", 2], STRING), value("b", ["batch", 2], STRING)],
        [value("joined", ["batch", 2], STRING), value("same", ["batch", 2], TensorProto.BOOL)],
    )
    a = np.array([["x", ""], ["long enough to be on the heap", "é"], ["", "same"]], object)
    b = np.array([["y", ""], ["2", "ü"], ["z", "same"]], object)
    ours = a_runner(made, tmp_path).run([a[:1], b[:1]], [a[1:], b[1:]])
    assert_same(ours, run_package(made, [a, b]))


@on_every_device
def test_long_strings_leave_nothing_behind_for_the_next_batch(device: SessionSettings, tmp_path: Path) -> None:
    runner = a_runner(identity(STRING, ["batch", 2]), tmp_path, device=device)
    long = np.array([[b"A" * 100_000, b"B" * 50_000]], object)
    short = np.array([[b"", b"c"]], object)
    for array in (short, long, short, long, long, short):
        (out,) = runner.run([array])
        assert out.tolist() == array.tolist()


def test_memory_of_large_string_answers_is_given_back(tmp_path: Path) -> None:
    runner = a_runner(identity(STRING, ["batch", 1]), tmp_path)
    runner.run([np.array([[b"x" * 8_000_000]], object)])
    assert runner.instance.memory_bytes > 8_000_000
    runner.run([np.array([[b"x"]], object)])
    assert runner.instance.memory_bytes < 1_000


def test_no_strings_at_all_are_an_answer(tmp_path: Path) -> None:
    runner = a_runner(identity(STRING, ["n"]), tmp_path, 0)
    (out,) = runner.run([np.empty((0,), object)])
    assert out.shape == (0,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x05\0\0\0abc", "has a string past its end"),
        (b"\x01\0\0\0a\x01\0\0\0b\x01\0\0\0c", "does not fill its batch"),
        (b"\x01\0\0\0a", "does not fill its batch"),
        (b"\x01\0\0\0a\x01\0", "does not fill its batch"),
    ],
)
def test_lying_lengths_of_strings_are_refused_before_the_run(data: bytes, message: str, tmp_path: Path) -> None:
    runner = a_runner(identity(STRING, ["batch", 2]), tmp_path)
    with pytest.raises(_native.NativeError, match=message) as caught:
        runner.instance.run([[((1, 2), data)]], 1)
    assert caught.value.reason == "INTERNAL"
    (out,) = runner.run([np.array([[b"p", b"q"]], object)])
    assert out.tolist() == [[b"p", b"q"]]


# -- shapes -----------------------------------------------------------------------------------------------------------


def two_by_two() -> onnx.ModelProto:
    """Inputs and outputs of different types and ranks; the second output has a shape that only the run tells."""
    return model(
        [
            node("ReduceSum", "a axes", "total", keepdims=0),
            node("Slice", "a start end axes", "part"),
            node("Mul", "b two", "twice"),
        ],
        [value("a", ["batch", 4]), value("b", ["batch", 2, 2], INT64)],
        [value("total", ["batch"]), value("part", ["batch", "some"]), value("twice", ["batch", 2, 2], INT64)],
        [
            constant("axes", np.array([1], np.int64)),
            constant("start", np.array([1], np.int64)),
            constant("end", np.array([3], np.int64)),
            constant("two", np.array(2, np.int64)),
        ],
    )


@on_every_device
def test_several_inputs_and_outputs_equal_the_package(device: SessionSettings, tmp_path: Path) -> None:
    made = two_by_two()
    runner = a_runner(made, tmp_path, device=device, part=((-1, 2), (-1, 2)))
    random = np.random.default_rng(3)
    for n in (1, 7, 64, 7):
        a = random_array(random, DataType.INT8, (n, 4)).astype(np.float32)  # sums are exact in any order
        b = random_array(random, DataType.INT32, (n, 2, 2)).astype(np.int64)
        requests = [[a[i : i + 3], b[i : i + 3]] for i in range(0, n, 3)]
        assert_same(runner.run(*requests), run_package(made, [a, b]))


@on_every_device
def test_outputs_of_prepared_and_unknown_shape_may_come_in_any_order(device: SessionSettings, tmp_path: Path) -> None:
    made = model(
        [node("NonZero", "x", "where"), node("Neg", "x", "minus"), node("Compress", "x mask", "found", axis=0)],
        [value("x", [4]), value("mask", [4], TensorProto.BOOL)],
        [value("where", [1, "n"], INT64), value("minus", [4]), value("found", ["n"])],
    )
    runner = a_runner(made, tmp_path, 0, device)
    for x, mask in (
        ([0.0, 1.0, 0.0, 2.0], [True, False, True, True]),
        ([0.0] * 4, [False] * 4),
        ([1.0, 2.0, 3.0, 4.0], [True] * 4),
    ):
        arrays = [np.array(x, np.float32), np.array(mask)]
        assert_same(runner.run(arrays), run_package(made, arrays))


def test_a_first_dimension_of_its_own_name_counts_what_the_run_found(tmp_path: Path) -> None:
    made = model(
        [node("Compress", "x mask", "y", axis=0)],
        [value("x", ["batch", 2]), value("mask", ["batch"], TensorProto.BOOL)],
        [value("y", ["found", 2])],
    )
    runner = a_runner(made, tmp_path)
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    for mask in ([True] * 4, [False] * 4, [False, True, True, False]):
        arrays = [x, np.array(mask)]
        assert_same(runner.run([one[:1] for one in arrays], [one[1:] for one in arrays]), run_package(made, arrays))


@on_every_device
def test_scalars_go_in_and_out(device: SessionSettings, tmp_path: Path) -> None:
    made = model(
        [node("ReduceSum", "x", "sum", keepdims=0), node("Mul", "sum factor", "y")],
        [value("x", ["n"]), value("factor", [])],
        [value("y", [])],
    )
    x, factor = np.array([1.5, 2.0], np.float32), np.array(4.0, np.float32)
    assert_same(a_runner(made, tmp_path, 0, device).run([x, factor]), run_package(made, [x, factor]))


def test_a_scalar_may_be_one_element_on_the_wire(tmp_path: Path) -> None:
    made = model([node("Neg", "x", "y")], [value("x", [])], [value("y", [])])
    runner = a_runner(made, tmp_path, 0, x=((1,), ()), y=((1,), ()))
    (out,) = runner.run([np.array([2.5], np.float32)])
    np.testing.assert_array_equal(out, np.array([-2.5], np.float32))


def test_a_model_without_batch_dimension_runs_one_request(tmp_path: Path) -> None:
    made = model(
        [node("MatMul", "x w", "y")],
        [value("x", [2, 3])],
        [value("y", [2, 2])],
        [constant("w", np.arange(6, dtype=np.float32).reshape(3, 2))],
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_same(a_runner(made, tmp_path, 0).run([x]), run_package(made, [x]))


@on_every_device
def test_tensors_without_elements_are_tensors(device: SessionSettings, tmp_path: Path) -> None:
    made = model([node("Identity", "x", "y")], [value("x", ["batch", "n"])], [value("y", ["batch", "n"])])
    runner = a_runner(made, tmp_path, device=device)
    for n in (0, 3, 0):
        x = np.ones((2, n), np.float32)
        assert_same(runner.run([x]), run_package(made, [x]))


def test_a_fixed_output_without_elements_is_one_too(tmp_path: Path) -> None:
    made = model(
        [node("Slice", "x zero zero one", "y")],
        [value("x", ["batch", 3])],
        [value("y", ["batch", 0])],
        [constant("zero", np.array([0], np.int64)), constant("one", np.array([1], np.int64))],
    )
    (out,) = a_runner(made, tmp_path).run([np.ones((4, 3), np.float32)])
    assert out.shape == (4, 0)


def test_an_output_whose_rank_the_file_does_not_say_is_read_after_the_run(tmp_path: Path) -> None:
    made = model(
        [node("Reshape", "x shape", "y")],
        [value("x", ["batch", 4]), value("shape", ["k"], INT64)],
        [value("y", None)],
    )
    session = open_session(made, tmp_path)
    assert session.outputs[0].dims == ()
    runner = Runner(
        session, settings_for(session, 0, x=((-1, 4), (-1, 4)), y=((-1, 2, 2), (-1, 2, 2)), shape=((3,), (3,)))
    )
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    shape = np.array([2, 2, 2], np.int64)
    assert_same(runner.run([x, shape]), run_package(made, [x, shape]))


def test_reshape_gives_the_wire_another_shape_than_the_model(tmp_path: Path) -> None:
    runner = a_runner(identity(dims=["batch", 6]), tmp_path, x=((-1, 2, 3), (-1, 6)), y=((-1, 3, 2), (-1, 6)))
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    (out,) = runner.run([x[:1]], [x[1:]])
    np.testing.assert_array_equal(out, x.reshape(4, 3, 2))


def test_reshape_carries_free_dimensions_over_in_order(tmp_path: Path) -> None:
    made = identity(dims=["batch", "n", 2, "m"])
    wire, inside = (-1, 1, -1, -1, 2), (-1, -1, 2, -1)
    runner = a_runner(made, tmp_path, x=(wire, inside), y=(wire, inside))
    x = np.arange(2 * 3 * 5 * 2, dtype=np.float32).reshape(2, 1, 3, 5, 2)
    (out,) = runner.run([x])
    np.testing.assert_array_equal(out, x)


def row_sums(width: int | str = "n") -> onnx.ModelProto:
    return model(
        [node("ReduceSum", "x axes", "y", keepdims=1), node("Identity", "x", "same")],
        [value("x", ["batch", width])],
        [value("y", ["batch", 1]), value("same", ["batch", width])],
        [constant("axes", np.array([1], np.int64))],
    )


@on_every_device
def test_more_shapes_and_row_counts_than_are_kept_give_right_answers(device: SessionSettings, tmp_path: Path) -> None:
    made = row_sums()
    runner = a_runner(made, tmp_path, 200, device)
    random = np.random.default_rng(4)
    # Most row counts twice for one width, then widths in random order, so that entries and shapes go and come again.
    order = [(5, int(n)) for n in random.permutation(np.repeat(np.arange(1, 101), 2))]
    order += [(int(width), int(n)) for width, n in random.integers(1, 40, (300, 2))]
    for width, n in order:
        x = random.integers(-100, 100, (n, width)).astype(np.float32)
        total, same = runner.run([x])
        np.testing.assert_array_equal(same, x)
        np.testing.assert_array_equal(total[:, 0], x.sum(axis=1))


def test_row_counts_beyond_the_index_are_found_all_the_same(tmp_path: Path) -> None:
    runner = a_runner(row_sums(2), tmp_path, 5_000)
    random = np.random.default_rng(5)
    for n in [*range(4_900, 5_000), *random.integers(1, 5_001, 50).tolist(), 5_000, 1]:
        x = random.integers(-100, 100, (n, 2)).astype(np.float32)
        total, _ = runner.run([x])
        np.testing.assert_array_equal(total[:, 0], x.sum(axis=1))


@on_every_device
def test_growing_shapes_keep_earlier_bindings_right(device: SessionSettings, tmp_path: Path) -> None:
    runner = a_runner(row_sums(), tmp_path, device=device)
    random = np.random.default_rng(6)
    for width in (1, 100, 1, 1_000, 100, 1, 10_000, 1_000):
        x = random.integers(-100, 100, (3, width)).astype(np.float32)
        total, same = runner.run([x[:1]], [x[1:]])
        np.testing.assert_array_equal(same, x)
        np.testing.assert_array_equal(total[:, 0], x.sum(axis=1))


def test_buffers_are_made_once_for_the_largest_batch(tmp_path: Path) -> None:
    runner = a_runner(identity(dims=["batch", 16]), tmp_path, 32)
    assert runner.instance.memory_bytes == 2 * 32 * 16 * 4
    runner.run([np.ones((32, 16), np.float32)])
    assert runner.instance.memory_bytes == 2 * 32 * 16 * 4


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "rows", "message"),
    [
        ([], 1, "a batch does not fit its model"),
        ([[((1, 3), bytes(12))]], 0, "a batch does not fit its model"),
        ([[((65, 3), bytes(780))]], 65, "a batch does not fit its model"),
        ([[]], 1, "a request does not fit its model"),
        ([[((1, 3), bytes(12))], []], 2, "a request does not fit its model"),
        ([[((1, 3), bytes(12))]], 2, "input 'x' does not fill its batch"),
        ([[((2, 3), bytes(24))]], 1, "input 'x' does not fill its batch"),
        ([[((1, 3), bytes(11))]], 1, "input 'x' does not fill its batch"),
    ],
)
def test_a_batch_that_does_not_add_up_is_refused_before_it_is_copied(
    requests: list[list[tuple[tuple[int, ...], bytes]]], rows: int, message: str, tmp_path: Path
) -> None:
    runner = a_runner(identity(), tmp_path)
    with pytest.raises(_native.NativeError, match=message) as caught:
        runner.instance.run(requests, rows)
    assert caught.value.reason == "INTERNAL"


def test_rows_of_different_shapes_never_share_a_batch(tmp_path: Path) -> None:
    runner = a_runner(row_sums(), tmp_path)
    # As many bytes as two rows of three: only a look at the shapes tells.
    with pytest.raises(_native.NativeError, match="a batch mixes shapes of input 'x'"):
        runner.instance.run([[((1, 2), bytes(8))], [((1, 4), bytes(16))]], 2)


def failing_reshape() -> onnx.ModelProto:
    """y is x in the shape that the second input says."""
    return model(
        [node("Reshape", "x shape", "y", name="/head/Reshape")],
        [value("x", ["n"]), value("shape", [2], INT64)],
        [value("y", ["a", "b"])],
    )


def failing_gather() -> onnx.ModelProto:
    return model(
        [node("Gather", "table i", "y")],
        [value("i", ["batch", 1], INT64)],
        [value("y", ["batch", 1])],
        [constant("table", np.arange(10, dtype=np.float32))],
    )


def assert_fit_for_clients(message: str) -> None:
    assert message.isprintable()
    for trace in ("onnxruntime_src", ".cc:", ".h:", "/tmp/", "site-packages"):
        assert trace not in message


def test_a_gather_beyond_its_table_is_the_models_failure(tmp_path: Path) -> None:
    runner = a_runner(failing_gather(), tmp_path)
    with pytest.raises(_native.NativeError, match="out of data bounds") as caught:
        runner.run([np.array([[3]])], [np.array([[10]])])
    assert caught.value.reason == "MODEL_RAISED"
    assert_fit_for_clients(caught.value.message)
    (out,) = runner.run([np.array([[3]])], [np.array([[9]])])
    np.testing.assert_array_equal(out, np.array([[3], [9]], np.float32))


@on_every_device
def test_a_reshape_that_cannot_be_names_its_node_and_no_file(device: SessionSettings, tmp_path: Path) -> None:
    runner = a_runner(failing_reshape(), tmp_path, 0, device)
    x = np.arange(6, dtype=np.float32)
    with pytest.raises(_native.NativeError, match="/head/Reshape") as caught:
        runner.run([x, np.array([4, 2])])
    assert caught.value.reason == "MODEL_RAISED"
    assert_fit_for_clients(caught.value.message)
    (out,) = runner.run([x, np.array([3, 2])])
    np.testing.assert_array_equal(out, x.reshape(3, 2))


def test_an_output_of_another_shape_than_promised_is_not_read(tmp_path: Path) -> None:
    runner = a_runner(failing_reshape(), tmp_path, 0, y=((-1, 3), (-1, 3)))
    x = np.arange(6, dtype=np.float32)
    with pytest.raises(_native.NativeError, match=r"output 'y' came as \[3,2\] where \[-1,3\] was promised") as caught:
        runner.run([x, np.array([3, 2])])
    assert caught.value.reason == "MODEL_OUTPUT_INVALID"
    (out,) = runner.run([x, np.array([2, 3])])
    np.testing.assert_array_equal(out, x.reshape(2, 3))


def test_a_buffer_is_never_written_in_another_shape_than_it_was_made_for(tmp_path: Path) -> None:
    # The file promises [4, 3]; the data ask for more.
    made = model(
        [node("Expand", "x shape", "y")],
        [value("x", [1]), value("shape", [2], INT64)],
        [value("y", [4, 3])],
    )
    runner = a_runner(made, tmp_path, 0)
    x = np.ones(1, np.float32)
    for shape in ([400, 300], [3, 4], [4, 2]):
        with pytest.raises(_native.NativeError) as caught:
            runner.run([x, np.array(shape)])
        assert caught.value.reason == "MODEL_RAISED"
    (out,) = runner.run([x, np.array([4, 3])])
    assert out.shape == (4, 3)


def test_outputs_are_gone_after_a_run_that_failed(tmp_path: Path) -> None:
    runner = a_runner(failing_gather(), tmp_path)
    runner.run([np.array([[1]])])
    with pytest.raises(_native.NativeError):
        runner.run([np.array([[99]])])
    # The next good run shows its own answer.
    (out,) = runner.run([np.array([[2]])])
    assert out.tolist() == [[2.0]]


def endless() -> onnx.ModelProto:
    """Counts to n, one node a step."""
    body = onnx.helper.make_graph(
        [node("Add", "count one", "next"), node("Identity", "go_on", "still")],
        "step",
        [value("i", [], INT64), value("go_on", [], TensorProto.BOOL), value("count", [], INT64)],
        [value("still", [], TensorProto.BOOL), value("next", [], INT64)],
        [constant("one", np.array(1, np.int64))],
    )
    return model(
        [node("Loop", "n yes zero", "y", body=body)],
        [value("n", [], INT64)],
        [value("y", [], INT64)],
        [constant("yes", np.array(True)), constant("zero", np.array(0, np.int64))],
    )


def test_a_run_on_another_thread_can_be_ended(tmp_path: Path) -> None:
    runner = a_runner(endless(), tmp_path, 0)
    (out,) = runner.run([np.array(1_000)])
    assert out == 1_000
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(runner.run, [np.array(2**60)])
        # Before, during or after its beginning: it stays ended.
        runner.instance.terminate()
        with pytest.raises(_native.NativeError, match="terminate") as caught:
            run.result(timeout=60)
    assert caught.value.reason == "MODEL_RAISED"


# -- sharing and keeping ----------------------------------------------------------------------------------------------


def test_instances_share_a_session_and_run_side_by_side(tmp_path: Path) -> None:
    session = open_session(two_by_two(), tmp_path)
    settings = settings_for(session, part=((-1, 2), (-1, 2)))
    runners = [Runner(session, settings) for _ in range(4)]
    session.close()  # They keep it.
    barrier = threading.Barrier(len(runners))

    def work(number: int) -> bool:
        random = np.random.default_rng(number)
        barrier.wait(timeout=30)
        for _ in range(200):
            n = int(random.integers(1, 65))
            a = random.integers(-9, 9, (n, 4)).astype(np.float32)
            b = random.integers(-9, 9, (n, 2, 2))
            total, part, twice = runners[number].run([a, b])
            np.testing.assert_array_equal(total, a.sum(axis=1))
            np.testing.assert_array_equal(part, a[:, 1:3])
            np.testing.assert_array_equal(twice, 2 * b)
        return True

    with ThreadPoolExecutor(len(runners)) as pool:
        assert all(pool.map(work, range(len(runners))))


def test_several_sessions_of_one_file_are_apart(tmp_path: Path) -> None:
    made = two_by_two()
    runners = [a_runner(made, tmp_path, part=((-1, 2), (-1, 2))) for _ in range(3)]
    a, b = np.ones((2, 4), np.float32), np.ones((2, 2, 2), np.int64)
    expected = run_package(made, [a, b])
    while runners:
        for runner in runners:
            assert_same(runner.run([a, b]), expected)
        runners.pop()


@on_every_device
@pytest.mark.parametrize("kind", ["fixed", "strings", "unknown"])
def test_ten_thousand_runs_leave_nothing_behind(kind: str, device: SessionSettings, tmp_path: Path) -> None:
    kinds: dict[str, tuple[onnx.ModelProto, np.ndarray]] = {
        "fixed": (identity(dims=["batch", 16]), np.ones((8, 16), np.float32)),
        "strings": (identity(STRING, ["batch", 2]), np.array([[b"short", b"x" * 300]] * 8, object)),
        "unknown": (
            identity(dims=["batch", "n"]),
            np.ones((8, 1_000), np.float32),
        ),
    }
    made, array = kinds[kind]
    runner = a_runner(made, tmp_path, device=device)
    wire = [[(array.shape, to_wire(array))]]
    run: Callable[[], object] = lambda: runner.instance.run(wire, len(array))  # noqa: E731
    for _ in range(1_000):
        run()
    process = psutil.Process()
    live, rss, buffers = _native.live_objects(), process.memory_info().rss, runner.instance.memory_bytes
    for _ in range(10_000):
        run()
    assert _native.live_objects() == live
    assert runner.instance.memory_bytes == buffers
    # A leak of 100 bytes a run would be a MiB.
    assert process.memory_info().rss - rss < 1 << 20
