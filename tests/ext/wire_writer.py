"""Writes a protobuf message in one of the many forms that mean the same.

Fields of different numbers in any order, repeated scalars packed, unpacked or both, singular fields more than once,
merged messages in pieces, map entries inside out, numbers with more bytes than they need, unknown fields in between. A
parser must see the same message in all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

VARINT, FIXED64, DELIMITED, START_GROUP, END_GROUP, FIXED32 = range(6)
FIXED = {FieldDescriptor.TYPE_FLOAT: (FIXED32, "<f"), FieldDescriptor.TYPE_DOUBLE: (FIXED64, "<d")}


def varint(value: int, longer: int = 0, most: int = 10) -> bytes:
    """`value`, as two's complement when it is negative, with up to `longer` bytes more than it needs, `most` in all."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(min(longer, most - len(out))):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def delimited(number: int, content: bytes) -> bytes:
    return tag(number, DELIMITED) + varint(len(content)) + content


def groups(number: int, depth: int) -> bytes:
    return tag(number, START_GROUP) * depth + tag(number, END_GROUP) * depth


class WireWriter:
    """Writes messages as `random` decides."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def write(self, message: Message) -> bytes:
        return b"".join(self._pieces(message))

    def _maybe(self) -> bool:
        return self.random.random() < 0.3

    def _longer(self) -> int:
        return self.random.randrange(4) if self._maybe() else 0

    def _varint(self, value: int) -> bytes:
        return varint(value, self._longer())

    def _tag(self, number: int, wire_type: int) -> bytes:
        return varint(number << 3 | wire_type, self._longer(), most=5)

    def _delimited(self, number: int, content: bytes) -> bytes:
        return self._tag(number, DELIMITED) + self._varint(len(content)) + content

    def _pieces(self, message: Message) -> list[bytes]:
        """Fields, in an order that means the same. Any run of them is a piece that merges with the rest."""
        chains = [self._field(message, field) for field in message.DESCRIPTOR.fields if not field.containing_oneof]
        chains += [self._oneof(message, oneof.name) for oneof in message.DESCRIPTOR.oneofs]
        if self._maybe():
            chains.append([self._unknown() for _ in range(self.random.randrange(1, 4))])
        return self._interleave(chains)

    def _interleave(self, chains: Iterable[Sequence[bytes]]) -> list[bytes]:
        waiting = [list(reversed(chain)) for chain in chains if chain]
        out = []
        while waiting:
            chain = self.random.choice(waiting)
            out.append(chain.pop())
            waiting = [chain for chain in waiting if chain]
        return out

    def _unknown(self) -> bytes:
        number = self.random.choice([15, 16, 99, 2**29 - 1])
        return self.random.choice(
            [
                self._tag(number, VARINT) + self._varint(self.random.randrange(1 << 64)),
                self._tag(number, FIXED64) + bytes(8),
                self._delimited(number, b"\xff\x00any"),
                self._tag(number, FIXED32) + bytes(4),
                groups(number, self.random.randrange(1, 5)),
                self._tag(number, START_GROUP) + self._delimited(1, b"x") + self._tag(number, END_GROUP),
            ]
        )

    def _field(self, message: Message, field: FieldDescriptor) -> list[bytes]:
        value: Any = getattr(message, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            return self._map(field, value)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if field.is_repeated:
                return [self._delimited(field.number, self.write(one)) for one in value]
            return self._merged(field.number, value) if message.HasField(field.name) else []
        if not field.is_repeated:
            return self._singular(field, value)
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            return [self._scalar_field(field, one) for one in value]
        return self._runs(field, list(value))

    def _merged(self, number: int, message: Message) -> list[bytes]:
        """One singular message in one or more occurrences."""
        pieces = self._pieces(message)
        cuts = sorted(self.random.randrange(len(pieces) + 1) for _ in range(self.random.randrange(3)))
        bounds = [0, *cuts, len(pieces)]
        return [self._delimited(number, b"".join(pieces[begin:end])) for begin, end in pairwise(bounds)]

    def _map(self, field: FieldDescriptor, values: Any) -> list[bytes]:
        out = []
        for key, value in values.items():
            if self._maybe():  # replaced by the next
                decoy = self._delimited(2, self._tag(1, VARINT) + self._varint(1))
                out.append(self._delimited(field.number, (self._delimited(1, key.encode()) if key else b"") + decoy))
            key_chain = [self._delimited(1, key.encode())] if key or self._maybe() else []
            value_chain = self._merged(2, value) if value.ByteSize() or self._maybe() else []
            out.append(self._delimited(field.number, b"".join(self._interleave([key_chain, value_chain]))))
        return out

    def _singular(self, field: FieldDescriptor, value: Any) -> list[bytes]:
        out = [self._scalar_field(field, "decoy")] if self._maybe() else []
        if value or out or self._maybe():
            out.append(self._scalar_field(field, value))
        return out

    def _oneof(self, message: Message, name: str) -> list[bytes]:
        chosen = message.WhichOneof(name)
        if chosen is None:
            return []
        fields = message.DESCRIPTOR.fields_by_name
        out = []
        if self._maybe():  # another member first
            out.append(self._tag(fields["bool_param"].number, VARINT) + self._varint(1))
        out.append(self._scalar_field(fields[chosen], getattr(message, chosen)))
        return out

    def _runs(self, field: FieldDescriptor, values: list[Any]) -> list[bytes]:
        """A repeated number: runs of packed values and single ones."""
        out = []
        while values:
            count = self.random.randrange(1, len(values) + 1)
            run, values = values[:count], values[count:]
            if len(run) == 1 and self._maybe():
                out.append(self._scalar_field(field, run[0]))
            else:
                out.append(self._delimited(field.number, b"".join(self._scalar(field, one) for one in run)))
            if self._maybe():
                out.append(self._delimited(field.number, b""))
        return out

    def _scalar_field(self, field: FieldDescriptor, value: Any) -> bytes:
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            return self._delimited(field.number, value.encode() if isinstance(value, str) else value)
        wire_type = FIXED[field.type][0] if field.type in FIXED else VARINT
        return self._tag(field.number, wire_type) + self._scalar(field, value)

    def _scalar(self, field: FieldDescriptor, value: Any) -> bytes:
        if field.type in FIXED:
            return struct.pack(FIXED[field.type][1], value)
        if field.type == FieldDescriptor.TYPE_BOOL and value and self._maybe():
            return self._varint(self.random.randrange(1, 1 << 64))
        return self._varint(int(value))


Mutation = Callable[[bytearray, Random], None]


def _flip(data: bytearray, random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _replace(data: bytearray, random: Random) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice(TELLING)


def _insert(data: bytearray, random: Random) -> None:
    data.insert(random.randrange(len(data) + 1), random.choice(TELLING))


def _erase(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data) + 1)
    del data[at : at + random.randrange(8)]


def _repeat(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = data[at : at + random.randrange(16)]


def _cut(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _step(data: bytearray, random: Random) -> None:
    if data:
        at = random.randrange(len(data))
        data[at] = (data[at] + random.choice((1, -1))) % 256


# Tags of the messages, borders of varints and of UTF-8.
TELLING = bytes.fromhex("000102040a12181a222a323a427b7c7f80c0edf4ff")
MUTATIONS: tuple[Mutation, ...] = (_flip, _replace, _insert, _erase, _repeat, _cut, _step)


def mutate(data: bytes, random: Random) -> bytes:
    """`data` with a few small changes."""
    out = bytearray(data)
    for _ in range(random.randrange(1, 5)):
        random.choice(MUTATIONS)(out, random)
    return bytes(out)
