"""What scenarios share: h2load's output, histograms, samplers, the verdict on the generator."""

from __future__ import annotations

import json
import struct
import sys
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from loadtests import rig
from loadtests.rig import BenchError
from server.demo.exposition import samples_of

H2LOAD = """starting benchmark...
Application protocol: h2c

finished in 2.00s, 563856.00 req/s, 176.38MB/s
requests: 1127712 total, 1127968 started, 1127712 done, {succeeded} succeeded, {failed} failed, {errored} errored
status codes: 1127712 2xx, 0 3xx, 0 4xx, 0 5xx
                     min         max         mean         sd        +/- sd
time for request:       77us      4.38ms       {mean}       104us    96.27%
time for connect:       67us       213us       142us        49us    62.50%
"""


def output(succeeded: int = 1127712, failed: int = 0, errored: int = 0, mean: str = "446us") -> str:
    return H2LOAD.format(succeeded=succeeded, failed=failed, errored=errored, mean=mean)


def test_h2load_is_read() -> None:
    assert rig.parse_h2load(output()) == (563856.0, 1127712, 446.0, 2.0)


@pytest.mark.parametrize(("text", "us"), [("12us", 12.0), ("1.50ms", 1500.0), ("2.00s", 2e6)])
def test_h2load_says_times_in_three_units(text: str, us: float) -> None:
    assert rig.parse_h2load(output(mean=text))[2] == us


@pytest.mark.parametrize("wrong", [{"failed": 1}, {"errored": 1}, {"succeeded": 5}])
def test_a_run_with_failures_says_nothing(wrong: dict[str, int]) -> None:
    with pytest.raises(BenchError, match="h2load: 1127712 done"):
        rig.parse_h2load(output(**wrong))


def test_other_output_is_an_error_that_shows_it() -> None:
    with pytest.raises(BenchError, match="cannot connect"):
        rig.parse_h2load("cannot connect to host")


def test_a_request_is_one_grpc_frame_with_raw_contents() -> None:
    x = rig.random_rows(2, 16)
    frame = rig.framed(rig.request_message("m", {"x": x}, "id-1"))
    flag, size = struct.unpack(">BI", frame[:5])
    message = pb.ModelInferRequest.FromString(frame[5:])
    assert (flag, size) == (0, len(frame) - 5)
    assert (message.model_name, message.id, list(message.inputs[0].shape)) == ("m", "id-1", [2, 16])
    assert message.raw_input_contents[0] == x.tobytes()


def exposition(counts: dict[str, int], model: str = "m") -> str:
    lines = [f'rows_bucket{{model="{model}",le="{bound}"}} {count}' for bound, count in counts.items()]
    return "\n".join(lines)


def test_a_histogram_is_what_came_into_each_bucket_in_between() -> None:
    before = samples_of(exposition({"1.0": 5, "2.0": 5, "64.0": 7, "+Inf": 7}))
    after = samples_of(exposition({"1.0": 6, "2.0": 9, "64.0": 20, "+Inf": 21}))
    assert rig.histogram(before, after, "rows", model="m") == {"1": 1, "2": 3, "64": 9, "inf": 1}


def test_a_histogram_sums_versions_and_leaves_out_other_models() -> None:
    text = exposition({"1.0": 1, "+Inf": 2}) + "\n" + exposition({"1.0": 10, "+Inf": 10}, model="other")
    assert rig.histogram(samples_of(""), samples_of(text), "rows", model="m") == {"1": 1, "inf": 1}


def test_a_missing_series_is_not_a_zero() -> None:
    found = samples_of('a{model="m"} 0')
    assert rig.needed(found, "a", model="m") == 0
    with pytest.raises(BenchError, match="no b"):
        rig.needed(found, "b")


def test_a_sampler_samples_at_least_once_and_raises_where_the_block_ends() -> None:
    with rig.Sampler(60.0, lambda: 7) as sampler:
        pass
    assert sampler.values == [7]

    def broken() -> None:
        raise BenchError("no answer")

    with pytest.raises(BenchError, match="no answer"), rig.Sampler(60.0, broken):
        pass
    with pytest.raises(KeyError), rig.Sampler(60.0, broken):
        raise KeyError("the block's own failure wins")


def generator(**changes: Any) -> str:
    measured = {"late_share": 0.01, "not_offered": 0}
    document = {"connections_lost": 0, "measured": measured}
    for key, value in changes.items():
        (measured if key in measured else document)[key] = value
    return json.dumps(document)


def test_a_generator_that_kept_up_is_trusted() -> None:
    assert rig.judged(generator())["trusted"]


@pytest.mark.parametrize("wrong", [{"late_share": 0.011}, {"not_offered": 1}, {"connections_lost": 1}])
def test_a_generator_that_did_not_keep_up_is_not_trusted(wrong: dict[str, Any]) -> None:
    assert not rig.judged(generator(**wrong))["trusted"]


def test_untrusted_runs_are_thrown_away_until_one_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [json.loads(generator(late_share=share)) for share in (0.5, 0.5, 0.0)]
    for run in runs:
        run["trusted"] = run["measured"]["late_share"] <= rig.MOST_LATE_SHARE
    monkeypatch.setattr(rig, "open_loop", lambda *_, **__: runs.pop(0))
    assert rig.trusted_open_loop(1, None, rate=1, seconds=1)["trusted"]  # type: ignore[arg-type]
    runs += [{**json.loads(generator(late_share=0.5)), "trusted": False}] * 2
    with pytest.raises(BenchError, match=r"50\.0 % late"):
        rig.trusted_open_loop(1, None, rate=1, seconds=1, tries=2)  # type: ignore[arg-type]


def test_a_child_that_does_not_say_what_it_should_is_an_error() -> None:
    command = [sys.executable, "-c", "print('something else')"]
    with pytest.raises(BenchError, match="something else"), rig.child(command, wait_for="ready"):
        pass


def test_a_child_is_ended_with_the_block() -> None:
    command = [sys.executable, "-c", "import signal; print('ready', flush=True); signal.pause()"]
    with rig.child(command, wait_for="ready") as (process, line):
        assert line == "ready\n"
        assert process.poll() is None
    assert process.returncode == -15


def test_random_rows_are_the_same_for_the_same_seed() -> None:
    assert np.array_equal(rig.random_rows(2, 3), rig.random_rows(2, 3))
    assert not np.array_equal(rig.random_rows(2, 3), rig.random_rows(2, 3, seed=4))
