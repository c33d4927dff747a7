# Status -> NativeError, the one place where a native refusal becomes an exception.

from libc.stdint cimport int32_t
from libcpp.string cimport string
from libcpp.string_view cimport string_view

from status cimport Reason, ReasonName, Status


class NativeError(Exception):
    """A refusal by the native core."""

    def __init__(self, reason, message):
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


cdef int check(const Status& status) except -1:
    """Raises NativeError when `status` is an error."""
    if status.ok():
        return 0
    cdef string_view name = ReasonName(status.reason)
    raise NativeError(name.data()[: name.size()].decode(), status.message.decode("utf-8", "replace"))
