"""Looks through an ONNX file before the runtime sees it: which other files does it name, and is it whole?

The protobuf wire format is walked in place over a memory map, without the onnx package: tensor data is stepped over,
never read, and nesting has a bound. What is accepted: external data in plain files with a single link inside the folder
of the version, named by relative paths without links. Anything else is refused with the reason, because a model file is
data from somebody else and the runtime would open whatever it names.

References are collected generously: every `location` of every tensor counts, whether or not the tensor says that its
data is external, so that split or repeated fields (which parsers merge) cannot hide one.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class OnnxFileError(Exception):
    """The file is refused. The message says why and names no path outside the version's folder."""


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where one tensor keeps its data."""

    location: str
    offset: int = 0
    length: int | None = None  # bytes; None: not stated
    is_used: bool = True  # the tensor itself says that its data is external


# Nested messages: protobuf's own parsers stop at 100.
_MOST_DEPTH = 100

# More files than this is no model that anybody exports (one file per tensor reaches some thousands).
_MOST_REFERENCES = 100_000

# Characters that no tool writes into a file name of external data. "*" begins the runtime's own marker for "this is a
# memory address", which must never come from a file.
_BAD_IN_LOCATION = frozenset('<>:;?"*|\\') | frozenset(map(chr, range(32))) | {"\x7f"}

# Field number -> kind of message inside, per kind of message (onnx.proto).
_GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING, _MODEL = range(8)
_CHILDREN: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
}
_NODE_OP_TYPE = 4
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_MODEL_GRAPH = 7
_EXTERNAL = 1

# What a node must contain somewhere to be worth a closer look.
_WORDS = (b"location", b"EPContext")

_Buffer = mmap.mmap | bytes


def _varint(data: _Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise OnnxFileError("the file is corrupt: a number does not end")
    raise OnnxFileError("the file is truncated or corrupt: a number ends outside its message")


def _fields(data: _Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, begin, end of the payload); a varint's payload is its encoding."""
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire_type = tag >> 3, tag & 7
        begin = at
        if wire_type == 2:
            length, begin = _varint(data, at, end)
            at = begin + length
        elif wire_type == 0:
            _, at = _varint(data, at, end)
        elif wire_type == 5:
            at += 4
        elif wire_type == 1:
            at += 8
        else:
            # Groups are not used by ONNX; 6 and 7 do not exist.
            raise OnnxFileError("the file is corrupt: it has a field of an unknown kind")
        if at > end:
            raise OnnxFileError("the file is truncated or corrupt: a field ends outside its message")
        if number == 0:
            raise OnnxFileError("the file is corrupt: it has a field without a number")
        yield number, wire_type, begin, at


def external_data(data: _Buffer) -> list[ExternalData]:
    """Every reference to another file in the bytes of a ModelProto: initializers, attributes, subgraphs, functions.

    Raises OnnxFileError when the bytes are not a whole ModelProto as far as they were looked at, nest too deep, or hold
    a node whose content lives in files of its own kind (EPContext).
    """
    found: list[ExternalData] = []
    has_graph = False
    if not len(data):
        raise OnnxFileError("the file is empty")
    # A stack instead of recursion: depth is data of the file.
    waiting: list[tuple[int, int, int, int]] = [(_MODEL, 0, len(data), 1)]
    while waiting:
        kind, at, end, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise OnnxFileError(f"the file nests graphs deeper than {_MOST_DEPTH} messages")
        if kind == _TENSOR:
            found += _references(data, at, end)
            if len(found) > _MOST_REFERENCES:
                raise OnnxFileError(f"the file has more than {_MOST_REFERENCES} references to other files")
            continue
        children = _CHILDREN[kind]
        for number, wire_type, begin, stop in _fields(data, at, end):
            has_graph = has_graph or (kind == _MODEL and number == _MODEL_GRAPH and wire_type == 2)
            if kind == _NODE and number == _NODE_OP_TYPE and data[begin:stop] == b"EPContext":
                raise OnnxFileError("the file holds compiled EPContext nodes, whose content cannot be checked")
            child = children.get(number)
            if child is None:
                continue
            if wire_type != 2:
                raise OnnxFileError("the file is corrupt: a message has the wrong kind")
            # Strings stand in the file as they are: a node without these words has nothing to look for, and most
            # nodes of most models are passed over here.
            if child in (_NODE, _ATTRIBUTE) and all(data.find(word, begin, stop) < 0 for word in _WORDS):
                continue
            waiting.append((child, begin, stop, depth + 1))
    if not has_graph:
        raise OnnxFileError("the file is not an ONNX model: it holds no graph")
    return found


def _references(data: _Buffer, at: int, end: int) -> list[ExternalData]:
    """What one TensorProto names."""
    values: dict[bytes, list[bytes]] = {}
    is_external = False
    for number, wire_type, begin, stop in _fields(data, at, end):
        if number == _TENSOR_DATA_LOCATION and wire_type == 0:
            is_external = _varint(data, begin, stop)[0] == _EXTERNAL
        elif number == _TENSOR_EXTERNAL_DATA and wire_type == 2:
            keys: list[bytes] = []
            texts: list[bytes] = []
            for inner, inner_type, first, last in _fields(data, begin, stop):
                if inner_type == 2 and inner in (_ENTRY_KEY, _ENTRY_VALUE):
                    (keys if inner == _ENTRY_KEY else texts).append(bytes(data[first:last]))
            for key in keys:
                values.setdefault(key, []).extend(texts or [b""])
    locations = values.get(b"location", [])
    if is_external and not locations:
        raise OnnxFileError("a tensor keeps its data outside the file and does not say where")
    offset = _number(values, b"offset") or 0
    length = _number(values, b"length")
    return [ExternalData(_text(location), offset, length, is_external) for location in locations]


def _number(values: dict[bytes, list[bytes]], key: bytes) -> int | None:
    texts = values.get(key)
    if not texts:
        return None
    if len(texts[-1]) > 19 or not texts[-1].isdigit():
        raise OnnxFileError(f"the {key.decode()} of external data is not a number of bytes")
    return int(texts[-1])


def _text(location: bytes) -> str:
    try:
        return location.decode()
    except UnicodeDecodeError as error:
        raise OnnxFileError("the location of external data is not UTF-8") from error


def _quoted(text: str) -> str:
    shown = text if len(text) <= 128 else text[:128] + "..."
    return repr(shown)


def check_location(location: str) -> tuple[str, ...]:
    """The parts of a location that stays inside its folder. Raises OnnxFileError for any other."""
    if not location:
        raise OnnxFileError("external data has an empty location")
    shown = _quoted(location)
    if len(location) > 4096:
        raise OnnxFileError(f"external data {shown}: the location is longer than 4096 characters")
    if _BAD_IN_LOCATION & set(location):
        raise OnnxFileError(f"external data {shown}: the location has a character that file names here may not have")
    if location.startswith("/"):
        raise OnnxFileError(f"external data {shown}: the location is absolute; it must lie in the version's folder")
    parts = tuple(part for part in location.split("/") if part not in ("", "."))
    if ".." in parts or not parts:
        raise OnnxFileError(f"external data {shown}: the location leaves the version's folder")
    return parts


def _check_external_file(folder: Path, reference: ExternalData) -> str | None:
    """Checks one reference against the folder; returns the file's relative path, None when it need not exist."""
    parts = check_location(reference.location)
    shown = _quoted(reference.location)
    path = folder
    for index, part in enumerate(parts):
        path = path / part
        try:
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if not reference.is_used:
                return None
            raise OnnxFileError(f"external data {shown}: there is no such file in the version's folder") from error
        except (OSError, ValueError) as error:
            raise OnnxFileError(f"external data {shown}: the file cannot be looked at") from error
        if stat.S_ISLNK(info.st_mode):
            raise OnnxFileError(f"external data {shown}: symbolic links are not followed; put the file itself there")
        if index + 1 < len(parts):
            continue
        if not stat.S_ISREG(info.st_mode):
            raise OnnxFileError(f"external data {shown}: it is not a plain file")
        if info.st_nlink != 1:
            raise OnnxFileError(f"external data {shown}: the file has more than one hard link; copy it instead")
        needed = reference.offset + (reference.length or 0)
        if needed > info.st_size:
            raise OnnxFileError(
                f"external data {shown}: the file has {info.st_size} bytes, the model expects at least {needed}"
            )
    return "/".join(parts)


def check_model_file(path: Path) -> list[str]:
    """Checks a model file and everything it names. Returns the external files' paths relative to the model's folder.

    Whether `path` itself may be opened (links that leave the repository) is the caller's question.
    Raises OnnxFileError with the reason.
    """
    try:
        # Without O_NONBLOCK a named pipe in the place of the file would hold the load for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OnnxFileError(f"{path.name} is not a plain file")
            if os.fstat(file.fileno()).st_size == 0:
                raise OnnxFileError(f"{path.name} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                references = external_data(data)
    except OSError as error:
        raise OnnxFileError(f"{path.name} cannot be read: {error.strerror}") from error
    checked: dict[str, None] = {}
    for reference in references:
        relative = _check_external_file(path.parent, reference)
        if relative is not None:
            checked[relative] = None
    return list(checked)
