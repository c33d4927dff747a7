"""Settings that may change while the server runs: logging does, tracing does not exist yet and says so."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from protos.gen import grpc_service_pb2 as pb
from server.errors import Reason, ServingError
from server.logs import LogSettings, TimeFormat

if TYPE_CHECKING:
    from server.logs import Logs
    from server.manager import Manager

# Trace settings of a server that does not trace, under the trace extension's names.
TRACE = {
    "trace_level": ["OFF"],
    "trace_rate": ["1000"],
    "trace_count": ["-1"],
    "log_frequency": ["0"],
    "trace_file": [""],
    "trace_mode": ["triton"],
}

_MEMBERS = {
    "log_file": "string_param",
    "log_info": "bool_param",
    "log_warning": "bool_param",
    "log_error": "bool_param",
    "log_verbose_level": "uint32_param",
    "log_format": "string_param",
}


class Settings:
    """LogSettings and TraceSetting."""

    def __init__(self, logs: Logs, manager: Manager) -> None:
        self._logs = logs
        self._manager = manager

    def log(self, request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
        """LogSettings: changes what is named, all or nothing, and answers what is in force. Raises ServingError."""
        values = {name: _log_value(name, setting) for name, setting in request.settings.items()}
        if values:
            self._logs.apply(changed(self._logs.settings, values))
        return _reported(self._logs.settings)

    def trace(self, request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
        """TraceSetting: answers OFF and refuses everything that would be something else. Raises ServingError."""
        if request.model_name:
            self._manager.resolve(request.model_name, "")
        for name, setting in request.settings.items():
            value = list(setting.value)
            if name not in TRACE:
                raise ServingError(
                    Reason.INVALID_TENSOR, f'unknown trace setting "{name}": there are {", ".join(TRACE)}'
                )
            # An empty list means "back to the default", which is where it is.
            if value and value != TRACE[name]:
                raise ServingError(
                    Reason.INVALID_TENSOR,
                    f'trace setting "{name}" cannot be {", ".join(value)}: this server does not trace, it stays '
                    f"{', '.join(TRACE[name]) or 'empty'}",
                )
        response = pb.TraceSettingResponse()
        for name, value in TRACE.items():
            response.settings[name].value.extend(value)
        return response


def changed(settings: LogSettings, values: dict[str, Any]) -> LogSettings:
    """The settings after a change. Raises ServingError for a value that cannot be had."""
    if values.get("log_file"):
        raise ServingError(
            Reason.NOT_SUPPORTED, "log_file cannot be changed: logs go to standard error, redirect it where it starts"
        )
    try:
        time_format = TimeFormat(values.get("log_format", settings.time_format.value))
    except ValueError as error:
        names = " or ".join(one.value for one in TimeFormat)
        raise ServingError(Reason.INVALID_TENSOR, f"log_format must be {names}") from error
    return dataclasses.replace(
        settings,
        info=values.get("log_info", settings.info),
        warning=values.get("log_warning", settings.warning),
        error=values.get("log_error", settings.error),
        verbose=values.get("log_verbose_level", settings.verbose),
        time_format=time_format,
    )


def _log_value(name: str, setting: pb.LogSettingsRequest.SettingValue) -> Any:
    member = _MEMBERS.get(name)
    if member is None:
        raise ServingError(Reason.INVALID_TENSOR, f'unknown log setting "{name}": there are {", ".join(_MEMBERS)}')
    if setting.WhichOneof("parameter_choice") != member:
        raise ServingError(Reason.INVALID_TENSOR, f'log setting "{name}" must be a {member}')
    return getattr(setting, member)


def _reported(settings: LogSettings) -> pb.LogSettingsResponse:
    response = pb.LogSettingsResponse()
    response.settings["log_file"].string_param = ""
    response.settings["log_info"].bool_param = settings.info
    response.settings["log_warning"].bool_param = settings.warning
    response.settings["log_error"].bool_param = settings.error
    response.settings["log_verbose_level"].uint32_param = settings.verbose
    response.settings["log_format"].string_param = settings.time_format.value
    return response
