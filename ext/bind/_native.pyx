# distutils: language = c++
# cython: language_level=3, embedsignature=False, boundscheck=False, freethreading_compatible=False
"""The one extension module. Thin: each include converts and calls, and decides nothing."""

include "errors.pxi"
include "log.pxi"
include "codec.pxi"
include "runtime.pxi"
include "batch_settings.pxi"
include "batching.pxi"
include "version.pxi"
include "route_table.pxi"
include "frontend.pxi"
