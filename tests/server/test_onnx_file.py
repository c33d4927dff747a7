"""The look through an ONNX file before the runtime sees it: what it names is found wherever it hides, and refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from server.onnx_file import ExternalData, OnnxFileError, check_location, check_model_file, external_data
from tests.server.fakes import field, onnx_bytes, varint

EXTERNAL = 1


def tensor(location: str = "w.bin", name: str = "w", **more: str) -> TensorProto:
    """An external tensor of two floats."""
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        made.external_data.add(key=key, value=value)
    return made


def model(nodes: list[onnx.NodeProto] | None = None, initializers: list[TensorProto] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(nodes or [], "g", [], [], initializer=initializers or [])
    return helper.make_model(graph)


def an_if(branch: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=helper.make_graph([], "e", [], []))


def found(model: onnx.ModelProto) -> list[ExternalData]:
    return external_data(model.SerializeToString())


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(OnnxFileError) as raised:
        call()
    return str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "1"
    folder.mkdir()
    return folder


def put(folder: Path, *tensors: TensorProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model(initializers=list(tensors)).SerializeToString())
    return path


# -- where references hide ---------------------------------------------------------------------------------------------


def test_a_model_without_external_data_names_nothing() -> None:
    weights = numpy_helper.from_array(np.zeros((100, 100), np.float32), "w")
    assert found(model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weights])) == []


def in_an_initializer() -> onnx.ModelProto:
    return model(initializers=[tensor()])


def in_an_attribute() -> onnx.ModelProto:
    return model([helper.make_node("Constant", [], ["c"], value=tensor())])


def in_a_list_of_an_attribute() -> onnx.ModelProto:
    return model([helper.make_node("Foo", [], ["c"], values=[tensor()])])


def in_a_subgraph() -> onnx.ModelProto:
    return model([an_if(helper.make_graph([], "t", [], [], initializer=[tensor()]))])


def in_a_nested_subgraph() -> onnx.ModelProto:
    inner = an_if(helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor())], "t", [], []))
    return model([an_if(helper.make_graph([inner], "t", [], []))])


def in_a_list_of_subgraphs() -> onnx.ModelProto:
    graph = helper.make_graph([], "t", [], [], initializer=[tensor()])
    return model([helper.make_node("Foo", [], ["c"], bodies=[graph])])


def in_a_function() -> onnx.ModelProto:
    made = model()
    node = helper.make_node("Constant", [], ["c"], value=tensor())
    made.functions.append(helper.make_function("d", "F", [], ["c"], [node], []))
    return made


def in_a_default_of_a_function() -> onnx.ModelProto:
    made = model()
    attribute = helper.make_attribute("value", tensor())
    made.functions.append(helper.make_function("d", "F", [], [], [], [], attribute_protos=[attribute]))
    return made


def in_sparse_values() -> onnx.ModelProto:
    made = model()
    sparse = made.graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor())
    return made


def in_sparse_indices() -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.add().indices.CopyFrom(tensor())
    return made


def in_training_info() -> onnx.ModelProto:
    made = model()
    made.training_info.add().algorithm.initializer.append(tensor())
    return made


HIDING_PLACES = [
    in_an_initializer,
    in_an_attribute,
    in_a_list_of_an_attribute,
    in_a_subgraph,
    in_a_nested_subgraph,
    in_a_list_of_subgraphs,
    in_a_function,
    in_a_default_of_a_function,
    in_sparse_values,
    in_sparse_indices,
    in_training_info,
]


@pytest.mark.parametrize("make", HIDING_PLACES)
def test_a_reference_is_found(make: Callable[[], onnx.ModelProto]) -> None:
    assert found(make()) == [ExternalData("w.bin")]


def test_offset_and_length_are_read() -> None:
    assert found(model(initializers=[tensor(offset="16", length="8")])) == [ExternalData("w.bin", 16, 8)]


def test_a_location_counts_even_when_the_tensor_says_it_is_not_used() -> None:
    made = tensor()
    made.data_location = TensorProto.DEFAULT
    assert found(model(initializers=[made])) == [ExternalData("w.bin", is_used=False)]


def test_split_and_repeated_fields_hide_nothing() -> None:
    entry = field(1, b"location") + field(2, b"a") + field(2, b"../b")
    raw = field(5, field(14, EXTERNAL) + field(13, entry) + field(13, field(1, b"location") + field(2, b"c")))
    graphs = field(7, b"") + field(7, raw)
    assert [one.location for one in external_data(graphs)] == ["a", "../b", "c"]


def entry(key: bytes, value: bytes) -> bytes:
    return field(13, field(1, key) + field(2, value))


# -- what is no model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"junk", "truncated or corrupt"),
        (field(2, b"producer"), "holds no graph"),
        (field(7, b"")[:1], "a number ends outside its message"),
        (field(7, b"graph")[:-1], "a field ends outside its message"),
        (varint(7 << 3 | 0) + varint(1), "a message has the wrong kind"),
        (varint(7 << 3 | 3) + varint(7 << 3 | 4), "a field of an unknown kind"),
        (varint(0 << 3 | 2) + b"\0", "a field without a number"),
        (b"\xff" * 11, "a number does not end"),
        (field(7, field(5, field(14, EXTERNAL))), "keeps its data outside the file and does not say where"),
        (field(7, field(5, field(13, field(1, b"location") + field(2, b"\xff")))), "is not UTF-8"),
        (field(7, field(5, entry(b"location", b"w") + entry(b"offset", b"-1"))), "the offset of external data is not"),
        (field(7, field(5, entry(b"location", b"w") + entry(b"length", b"9" * 20))), "the length of external data is"),
        (field(7, field(1, field(4, b"EPContext"))), "EPContext"),
        (field(7, field(1, field(5, field(6, field(1, field(4, b"EPContext")))))), "EPContext"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_model_are_refused(data: bytes, reason: str) -> None:
    assert reason in refusal(lambda: external_data(data))


def test_nesting_has_an_end() -> None:
    nested = field(5, field(13, field(1, b"location") + field(2, b"w")))
    for _ in range(60):
        nested = field(1, field(5, field(6, nested)))
    assert "nests graphs deeper than 100" in refusal(lambda: external_data(field(7, nested)))


@given(st.binary(max_size=200))
@example(onnx_bytes())
def test_no_bytes_do_anything_but_be_refused(data: bytes) -> None:
    with contextlib.suppress(OnnxFileError):
        assert isinstance(external_data(data), list)


@given(st.integers(0, 10_000))
def test_a_truncated_model_is_refused_or_has_lost_only_a_tail(size: int) -> None:
    whole = in_a_nested_subgraph().SerializeToString()
    cut = whole[: size % len(whole)]
    try:
        external_data(cut)
    except OnnxFileError:
        return
    onnx.ModelProto.FromString(cut)  # what is accepted is a whole message


# -- locations and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("location", "parts"), [("w", ("w",)), ("a/b", ("a", "b")), ("./a//b", ("a", "b"))])
def test_locations_inside(location: str, parts: tuple[str, ...]) -> None:
    assert check_location(location) == parts


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("", "empty location"),
        ("/etc/passwd", "is absolute"),
        ("../w", "leaves the version's folder"),
        ("a/../../w", "leaves the version's folder"),
        (".", "leaves the version's folder"),
        ("a\0b", "a character that file names here may not have"),
        ("C:\\w", "a character that file names here may not have"),
        ("*/_ORT_MEM_ADDR_/*", "a character that file names here may not have"),
        ("file://w", "a character that file names here may not have"),
        ("a\nb", "a character that file names here may not have"),
        ("w" * 5000, "longer than 4096 characters"),
    ],
)
def test_locations_that_are_refused(location: str, reason: str) -> None:
    message = refusal(lambda: check_location(location))
    assert reason in message
    assert len(message) < 300


def test_files_in_the_folder_are_accepted(folder: Path) -> None:
    (folder / "w.bin").write_bytes(bytes(24))
    (folder / "sub").mkdir()
    (folder / "sub" / "v.bin").write_bytes(bytes(8))
    path = put(folder, tensor(offset="16", length="8"), tensor(name="again"), tensor("sub/v.bin", name="v"))
    assert sorted(check_model_file(path)) == ["sub/v.bin", "w.bin"]


def test_an_absent_file_is_told_unless_it_is_not_used(folder: Path) -> None:
    assert "'w.bin': there is no such file" in refusal(lambda: check_model_file(put(folder, tensor())))
    unused = tensor()
    unused.data_location = TensorProto.DEFAULT
    assert check_model_file(put(folder, unused)) == []


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(8))
    (folder / "w.bin").symlink_to(secret)
    assert "symbolic links are not followed" in refusal(lambda: check_model_file(put(folder, tensor())))
    (folder / "sub").symlink_to(tmp_path)
    assert "symbolic links" in refusal(lambda: check_model_file(put(folder, tensor("sub/secret"))))
    (folder / "w.bin").unlink()
    os.link(secret, folder / "w.bin")
    assert "more than one hard link" in refusal(lambda: check_model_file(put(folder, tensor())))


def test_what_is_no_plain_file_is_refused(folder: Path) -> None:
    (folder / "w.bin").mkdir()
    assert "is not a plain file" in refusal(lambda: check_model_file(put(folder, tensor())))
    (folder / "w.bin").rmdir()
    os.mkfifo(folder / "w.bin")
    assert "is not a plain file" in refusal(lambda: check_model_file(put(folder, tensor())))
    assert "no such file" in refusal(lambda: check_model_file(put(folder, tensor("w.bin/x"))))


def test_a_file_that_is_too_short_is_told(folder: Path) -> None:
    (folder / "w.bin").write_bytes(bytes(10))
    path = put(folder, tensor(offset="4", length="8"))
    assert "has 10 bytes, the model expects at least 12" in refusal(lambda: check_model_file(path))


def test_the_model_file_itself_is_looked_at(folder: Path) -> None:
    path = folder / "model.onnx"
    assert "cannot be read: No such file" in refusal(lambda: check_model_file(path))
    path.write_bytes(b"")
    assert refusal(lambda: check_model_file(path)) == "model.onnx is empty"
    path.unlink()
    os.mkfifo(path)
    assert refusal(lambda: check_model_file(path)) == "model.onnx is not a plain file"
    path.unlink()
    path.mkdir()
    assert "model.onnx" in refusal(lambda: check_model_file(path))


@pytest.mark.parametrize("make", HIDING_PLACES)
def test_a_path_out_of_the_folder_is_refused_wherever_it_hides(
    folder: Path, make: Callable[[], onnx.ModelProto]
) -> None:
    data = make().SerializeToString().replace(b"w.bin", b"../wb")
    (folder / "model.onnx").write_bytes(data)
    assert "leaves the version's folder" in refusal(lambda: check_model_file(folder / "model.onnx"))


def test_a_model_with_its_weights_beside_it_as_the_package_writes_it(folder: Path) -> None:
    weights = numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    onnx.save_model(
        model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weights]),
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.data",
        size_threshold=0,
    )
    assert check_model_file(folder / "model.onnx") == ["weights.data"]
