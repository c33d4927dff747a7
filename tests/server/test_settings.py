"""LogSettings and TraceSetting."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from protos.gen import grpc_service_pb2 as pb
from server.config import ControlMode
from server.errors import Reason, ServingError
from server.logs import Logs, LogSettings, TimeFormat
from server.rpc.settings import TRACE, Settings
from tests.server.world import World

LogValue = pb.LogSettingsRequest.SettingValue
TraceValue = pb.TraceSettingRequest.SettingValue


@pytest.fixture
def logs() -> Logs:
    return Logs(LogSettings(), lambda _level: None, root=logging.Logger("apart"))


@pytest.fixture
def settings(logs: Logs, world: World) -> Settings:
    world.put("a")
    return Settings(logs, world.started(ControlMode.EXPLICIT, load_models=["a"]))


def plain(response: pb.LogSettingsResponse) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "") for name, value in response.settings.items()
    }


def test_nothing_asked_is_everything_told(settings: Settings) -> None:
    assert plain(settings.log(pb.LogSettingsRequest())) == {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }


def test_what_is_named_changes_and_is_in_force(settings: Settings, logs: Logs) -> None:
    request = pb.LogSettingsRequest(
        settings={
            "log_info": LogValue(bool_param=False),
            "log_verbose_level": LogValue(uint32_param=2),
            "log_format": LogValue(string_param="ISO8601"),
            "log_file": LogValue(string_param=""),
        }
    )
    answer = plain(settings.log(request))
    assert (answer["log_info"], answer["log_warning"], answer["log_verbose_level"]) == (False, True, 2)
    assert logs.settings == LogSettings(info=False, verbose=2, time_format=TimeFormat.ISO8601)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("log_colour", LogValue(bool_param=True), Reason.INVALID_TENSOR),
        ("log_info", LogValue(string_param="yes"), Reason.INVALID_TENSOR),
        ("log_info", LogValue(), Reason.INVALID_TENSOR),
        ("log_verbose_level", LogValue(bool_param=True), Reason.INVALID_TENSOR),
        ("log_format", LogValue(string_param="xml"), Reason.INVALID_TENSOR),
        ("log_file", LogValue(string_param="/etc/cron.d/x"), Reason.NOT_SUPPORTED),
    ],
)
def test_a_wrong_setting_changes_nothing(
    settings: Settings, logs: Logs, name: str, value: LogValue, reason: Reason
) -> None:
    request = pb.LogSettingsRequest(settings={"log_warning": LogValue(bool_param=False), name: value})
    with pytest.raises(ServingError) as raised:
        settings.log(request)
    assert raised.value.reason is reason
    assert logs.settings == LogSettings()


def test_tracing_is_off_and_says_so(settings: Settings) -> None:
    for request in (
        pb.TraceSettingRequest(),
        pb.TraceSettingRequest(model_name="a"),
        pb.TraceSettingRequest(settings={"trace_level": TraceValue(value=["OFF"])}),
        pb.TraceSettingRequest(settings={"trace_rate": TraceValue(value=[])}),
    ):
        answer = settings.trace(request)
        assert {name: list(value.value) for name, value in answer.settings.items()} == TRACE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trace_level", ["TIMESTAMPS"]),
        ("trace_level", ["OFF", "TENSORS"]),
        ("trace_rate", ["1"]),
        ("trace_file", ["/tmp/x"]),
        ("trace_speed", ["1"]),
    ],
)
def test_tracing_that_cannot_be_had_is_refused(settings: Settings, name: str, value: list[str]) -> None:
    with pytest.raises(ServingError) as raised:
        settings.trace(pb.TraceSettingRequest(settings={name: TraceValue(value=value)}))
    assert raised.value.reason is Reason.INVALID_TENSOR
    assert name in raised.value.message


def test_trace_settings_of_an_unknown_model_are_not_found(settings: Settings) -> None:
    with pytest.raises(ServingError) as raised:
        settings.trace(pb.TraceSettingRequest(model_name="nobody"))
    assert raised.value.reason is Reason.MODEL_NOT_FOUND
