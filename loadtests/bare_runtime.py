"""The reference for compute: ONNX Runtime alone in a loop, one thread, prebound memory.

`python -m loadtests.bare_runtime FILE --batches 8,16,32,64 --seconds 2` prints rows/s per batch size as JSON. With runs
of a millisecond and more, what Python adds between two runs (some 5 us) is below half a percent.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import onnxruntime


def session_of(path: str) -> onnxruntime.InferenceSession:
    """A session as the server makes it: one thread, no spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_seconds(session: onnxruntime.InferenceSession, rows: int, seconds: float) -> tuple[float, float]:
    """Mean seconds and mean CPU seconds of a run of `rows` rows over about `seconds`, after five warm runs."""
    (tensor,) = session.get_inputs()
    x = np.random.default_rng(3).standard_normal((rows, *tensor.shape[1:]), dtype=np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input(tensor.name, x)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    for _ in range(5):
        session.run_with_iobinding(binding)
    runs, began, cpu_began = 0, time.perf_counter(), time.process_time()
    while (took := time.perf_counter() - began) < seconds:
        session.run_with_iobinding(binding)
        runs += 1
    return took / runs, (time.process_time() - cpu_began) / runs


def main() -> None:
    """Prints {"rows_per_s": {"8": ..., ...}, "run_us": {...}, "cpu_us": {...}}; cpu_us is the CPU time of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file")
    parser.add_argument("--batches", default="1,8,16,32,64")
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    session = session_of(args.file)
    took = {rows: run_seconds(session, int(rows), args.seconds) for rows in args.batches.split(",")}
    print(
        json.dumps(
            {
                "rows_per_s": {rows: round(int(rows) / wall, 2) for rows, (wall, _) in took.items()},
                "run_us": {rows: round(1e6 * wall, 2) for rows, (wall, _) in took.items()},
                "cpu_us": {rows: round(1e6 * cpu, 2) for rows, (_, cpu) in took.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
