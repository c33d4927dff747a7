"""A process that opens the runtime with its calls counted and uses everything that serving uses; prints the counts.

Run as `python -m tests.ext.ort_walk`: a process opens the runtime once, so counting needs one of its own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from server import _native
from server.loader import find_runtime_library

_native.ort_open(str(find_runtime_library()), record_calls=True)

import numpy as np  # noqa: E402
from onnx import TensorProto  # noqa: E402

from server.settings import SessionSettings  # noqa: E402
from tests.ext.ort_models import DEVICES, Runner, model, node, open_session, settings_for, value  # noqa: E402


def use(folder: Path, settings: SessionSettings) -> None:
    """One session of each kind of tensor: fixed and free shapes, strings in and out, and a run that fails."""
    made = model(
        [node("NonZero", "x", "where"), node("Neg", "x", "minus"), node("Identity", "text", "same")],
        [value("x", [1, 2]), value("text", [1, 1], TensorProto.STRING)],
        [
            value("where", [2, "found"], TensorProto.INT64),
            value("minus", [1, 2]),
            value("same", [1, 1], TensorProto.STRING),
        ],
        metadata={"author": "nobody"},
    )
    session = open_session(made, folder, settings)
    assert session.custom_metadata("author") == "nobody"
    runner = Runner(session, settings_for(session, 0))
    runner.run([np.ones((1, 2), np.float32), np.array([[b"x" * 100_000]], object)])
    runner.instance.terminate()
    try:
        runner.run([np.ones((1, 2), np.float32), np.array([[b""]], object)])
    except _native.NativeError as error:
        assert error.reason == "MODEL_RAISED", error  # noqa: PT017
    else:
        raise AssertionError("a run that was ended went on")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for settings in DEVICES.values():
            use(folder, settings)
        use(
            folder,
            SessionSettings(
                cpu_mem_arena=False,
                mem_pattern=False,
                intra_op_threads=2,
                run_config_entries={"disable_synchronize_execution_providers": "0"},
            ),
        )
    for provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider", "XnnpackExecutionProvider"):
        try:
            _native.ort_try_provider(provider, {})
        except _native.NativeError as error:
            assert error.reason == "LOAD_FAILED", error  # noqa: PT017
    calls = {number: _native.ort_calls(number) for number, _ in _native.ort_slots()}
    print(json.dumps({"calls": calls, "devices": list(DEVICES), "live": _native.live_objects()}))


if __name__ == "__main__":
    main()
