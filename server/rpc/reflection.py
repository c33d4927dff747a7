"""Server reflection: what a client without our .proto files needs to call us (grpcurl, test tools).

One reply per request, in order. v1 and v1alpha are the same messages under two package names, so both are answered with
v1's classes. A question that has no answer is an `error_response` and the call goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError

from protos import POOL
from protos.gen import reflection_pb2, reflection_v1alpha_pb2
from server.errors import Reason, ServingError
from server.grpc_status import status_of

if TYPE_CHECKING:
    from server._native import SlowCall

# Imported for what it puts into the pool: its package is a service here, and can be asked about.
V1ALPHA = reflection_v1alpha_pb2.DESCRIPTOR

NOT_FOUND = status_of(Reason.MODEL_NOT_FOUND)
INVALID_ARGUMENT = status_of(Reason.INVALID_TENSOR)


class Reflection:
    """Answers from a descriptor pool, where the services' messages must be. Stateless: one object serves all calls."""

    def __init__(self, services: Sequence[str], pool: DescriptorPool = POOL) -> None:
        self._services = tuple(sorted(services))
        self._pool: Any = pool  # its stub has no types

    def stream(self, call: SlowCall) -> ReflectionStream:
        """A new ServerReflectionInfo call."""
        return ReflectionStream(self, call)

    def answer(self, request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
        """The reply to one question."""
        response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
        question = request.WhichOneof("message_request")
        try:
            if question == "list_services":
                for name in self._services:
                    response.list_services_response.service.add(name=name)
            elif question == "file_by_filename":
                self._add_files(response, self._pool.FindFileByName(request.file_by_filename))
            elif question == "file_containing_symbol":
                self._add_files(response, self._file_of(request.file_containing_symbol))
            elif question == "file_containing_extension":
                wanted = request.file_containing_extension
                message = self._pool.FindMessageTypeByName(wanted.containing_type)
                extension = self._pool.FindExtensionByNumber(message, wanted.extension_number)
                self._add_files(response, extension.file)
            elif question == "all_extension_numbers_of_type":
                message = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                numbers = sorted(extension.number for extension in self._pool.FindAllExtensions(message))
                response.all_extension_numbers_response.base_type_name = message.full_name
                response.all_extension_numbers_response.extension_number.extend(numbers)
            else:
                response.error_response.error_code = INVALID_ARGUMENT
                response.error_response.error_message = "the request asks for nothing"
        except KeyError:
            response.error_response.error_code = NOT_FOUND
            response.error_response.error_message = f"nothing known for {question}"
        return response

    def _file_of(self, symbol: str) -> FileDescriptor:
        """Where a symbol is declared: a service, its method, a message, its field, an enum. Raises KeyError."""
        try:
            file: FileDescriptor = self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            # The pool does not know members by their full name.
            parent, _, member = symbol.rpartition(".")
            file = self._pool.FindFileContainingSymbol(parent)
            services, messages = file.services_by_name, file.message_types_by_name
            if not any(
                owner.full_name == parent and member in members
                for owner, members in (
                    *((service, service.methods_by_name) for service in services.values()),
                    *((message, message.fields_by_name) for message in messages.values()),
                )
            ):
                raise
        return file

    @staticmethod
    def _add_files(response: reflection_pb2.ServerReflectionResponse, file: FileDescriptor) -> None:
        """The file asked for, then everything it imports, each once."""
        files = {file.name: file}
        waiting = [file]
        while waiting:
            for imported in waiting.pop().dependencies:
                if imported.name not in files:
                    files[imported.name] = imported
                    waiting.append(imported)
        response.file_descriptor_response.file_descriptor_proto.extend(f.serialized_pb for f in files.values())


class ReflectionStream:
    """One ServerReflectionInfo call."""

    def __init__(self, reflection: Reflection, call: SlowCall) -> None:
        self._reflection = reflection
        self._call = call

    def message(self, payload: bytes) -> None:
        """One question, answered at once. Raises ServingError when it cannot be read."""
        try:
            request = reflection_pb2.ServerReflectionRequest.FromString(payload)
        except DecodeError as error:
            raise ServingError(Reason.MALFORMED_MESSAGE, "the message is not a ServerReflectionRequest") from error
        self._call.send(self._reflection.answer(request).SerializeToString())

    def half_close(self) -> bool:
        """The client has no more questions, and all are answered."""
        return False

    def closed(self) -> None:
        """The call is over; it held nothing."""
