"""A model repository, a fake native core, and the real manager between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.config import ControlMode
from server.loader import Loader
from server.manager import Manager
from server.model_config import Machine
from tests.server.fakes import FakeNative, ManualClock, eventually, put_model


class World:
    """A repository, a fake native core, and the manager between them."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.native = FakeNative()
        self.clock = ManualClock()
        self.managers: list[Manager] = []

    def put(self, name: str, version: str = "1", tag: str | None = None, config: str = "") -> Path:
        return put_model(self.repository, name, version, tag, config)

    def manager(self, mode: ControlMode = ControlMode.EXPLICIT, **arguments: Any) -> Manager:
        loader = Loader(self.native, Machine(), clock=self.clock)
        manager = Manager(
            self.repository, loader, self.native, self.native.publish, control_mode=mode, clock=self.clock, **arguments
        )
        self.managers.append(manager)
        return manager

    def started(self, mode: ControlMode = ControlMode.NONE, **arguments: Any) -> Manager:
        manager = self.manager(mode, **arguments)
        manager.load_all()
        return manager

    def settle(self) -> None:
        """Waits for what is being retired in the background."""
        for manager in self.managers:
            eventually(lambda manager=manager: not manager._retiring, "every retirement ends")
