# The native log's level and the counts of live objects.

from log cimport LiveCount, LiveKind, SetLogLevel, live_kind_name, n_live_kinds


cdef str text_of(string_view view):
    return view.data()[: view.size()].decode("utf-8", "replace")


def set_log_level(int level):
    SetLogLevel(level)


def live_objects():
    return {text_of(live_kind_name(kind)): LiveCount(<LiveKind>kind) for kind in range(n_live_kinds())}
