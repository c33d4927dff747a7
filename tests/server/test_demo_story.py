"""`tidegate demo` with a real server: the exit code and the document; and without one: what it says."""

from __future__ import annotations

import json
import sys

import pytest

from server.demo import main as demo
from server.demo import process


def test_the_story_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert document["swapped"]["failed"] == 0
    assert document["swapped"]["versions_after"].keys() == {"2"}
    assert [part["own"] for part in document["classified"]] == [899, 899]
    assert document["exit_status"] == 0


def test_a_server_that_does_not_start_is_told_with_its_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complains = "import sys; print('no room for models', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(process, "serve_command", lambda: [sys.executable, "-c", complains])
    assert demo.main(["--quick", "--json"]) == 1
    captured = capsys.readouterr()
    assert "status 3" in json.loads(captured.out)["error"]
    assert "no room for models" in captured.err


def test_a_server_that_ends_by_itself_is_not_waited_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("serve")
    silent = process.ServeProcess(folder, folder / "log", prefix=[sys.executable, "-c", "pass"])
    with pytest.raises(process.ServeFailed, match="before it was ready"):
        silent.start()
    assert silent.stop() == 0
