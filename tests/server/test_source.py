"""What a repository directory holds, also when it holds what it should not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.model_config import MOST_CONFIG_BYTES
from server.source import ModelFolder, Repository, SourceError, Watcher, is_version_name
from tests.server.fakes import put_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    return root


def look(root: Path, name: str = "a") -> ModelFolder:
    folder = Repository(root).model(name)
    assert folder is not None
    return folder


def test_models_and_versions_are_folders_with_names_we_take(root: Path) -> None:
    for name in ("a", "b-1.x_y", ".hidden", "with space", "ü", "-dash"):
        (root / name).mkdir()
    (root / "file").write_text("")
    for version in ("1", "2.0.0-rc.1", "01", "latest", "v1", "1.2.3.4", "0"):
        (root / "a" / version).mkdir()
    (root / "a" / "3").write_text("a file")
    repository = Repository(root)
    assert repository.names() == ["-dash", "a", "b-1.x_y"]
    assert sorted(look(root).versions) == ["0", "1", "2.0.0-rc.1"]
    assert sorted(repository.version_names("a")) == ["0", "1", "2.0.0-rc.1"]
    assert repository.version_names("nobody") == []
    assert repository.version_names("../a") == []
    assert repository.has("a")
    assert not repository.has("file")
    assert not repository.has("..")
    assert repository.model("nobody") is None
    assert repository.model("../models/a") is None


@pytest.mark.parametrize("name", ["1", "0", "10", "1.2", "1.2.3", "1.0.0-rc.1+b"])
def test_version_names(name: str) -> None:
    assert is_version_name(name)


@pytest.mark.parametrize("name", ["", "01", "-1", "v1", "latest", "1.", "1 ", "1/2", "..", "1" * 129, "1\n"])
def test_what_is_no_version_name(name: str) -> None:
    assert not is_version_name(name)


def test_a_root_that_is_gone_is_told(root: Path) -> None:
    root.rmdir()
    with pytest.raises(SourceError, match="the model repository cannot be read: No such file or directory"):
        Repository(root).names()


def test_the_model_file_is_found(root: Path) -> None:
    folder = put_model(root, "a")
    assert look(root).model_path("1", "model.onnx") == folder / "model.onnx"
    with pytest.raises(SourceError, match=r"version folder 1 has no other\.onnx"):
        look(root).model_path("1", "other.onnx")
    (folder / "dir.onnx").mkdir()
    with pytest.raises(SourceError, match=r"1/dir\.onnx is not a plain file"):
        look(root).model_path("1", "dir.onnx")
    os.mkfifo(folder / "pipe.onnx")
    with pytest.raises(SourceError, match=r"1/pipe\.onnx is not a plain file"):
        look(root).model_path("1", "pipe.onnx")


# -- links -------------------------------------------------------------------------------------------------------------


def test_links_inside_the_repository_are_followed(root: Path) -> None:
    put_model(root, "a", "1")
    (root / "a" / "2").symlink_to(root / "a" / "1")
    (root / "b").symlink_to(root / "a")
    (root / "a" / "1" / "linked.onnx").symlink_to("model.onnx")
    assert look(root).model_path("2", "model.onnx").exists()
    assert look(root).model_path("1", "linked.onnx").exists()
    assert sorted(look(root, "b").versions) == ["1", "2"]


def test_links_out_of_the_repository_are_refused(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    put_model(outside, "x")
    put_model(root, "a")
    (root / "a" / "2").symlink_to(outside / "x" / "1")
    (root / "a" / "1" / "out.onnx").symlink_to(outside / "x" / "1" / "model.onnx")
    (root / "b").symlink_to(outside / "x")
    (root / "c" / "1").mkdir(parents=True)
    (root / "c" / "config.pbtxt").symlink_to("/etc/hostname")
    assert look(root).versions["2"].problem == "version folder 2 is a link that leaves the model repository"
    with pytest.raises(SourceError, match="version folder 2 is a link that leaves"):
        look(root).model_path("2", "model.onnx")
    with pytest.raises(SourceError, match=r"1/out\.onnx is a link that leaves the model repository"):
        look(root).model_path("1", "out.onnx")
    assert look(root, "b").problem == "the model's folder is a link that leaves the model repository"
    assert look(root, "b").versions == {}
    assert look(root, "c").problem == "config.pbtxt is a link that leaves the model repository"


def test_links_to_nowhere_and_in_circles(root: Path) -> None:
    folder = put_model(root, "a")
    (folder / "gone.onnx").symlink_to("nowhere")
    (folder / "round.onnx").symlink_to("round.onnx")
    assert look(root).problem == look(root).versions["1"].problem == ""
    with pytest.raises(SourceError, match=r"has no gone\.onnx"):
        look(root).model_path("1", "gone.onnx")
    with pytest.raises(SourceError, match=r"1/round\.onnx"):
        look(root).model_path("1", "round.onnx")


def test_a_repository_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    put_model(root, "a")
    (tmp_path / "alias").symlink_to(root)
    assert look(tmp_path / "alias").model_path("1", "model.onnx").exists()


# -- config ------------------------------------------------------------------------------------------------------------


def test_the_config_is_read_or_told(root: Path) -> None:
    put_model(root, "a", config="max_batch_size: 3")
    assert look(root).config_text == "max_batch_size: 3"
    config = root / "a" / "config.pbtxt"
    config.write_bytes(b"\xff\xfe")
    assert look(root).problem == "config.pbtxt is not UTF-8"
    config.write_bytes(b"#" * (MOST_CONFIG_BYTES + 1))
    assert look(root).problem == f"config.pbtxt is larger than {MOST_CONFIG_BYTES} bytes"
    config.unlink()
    assert look(root).config_text == ""
    os.mkfifo(config)
    assert look(root).problem == "config.pbtxt is not a plain file"
    config.unlink()
    config.mkdir()
    assert look(root).problem == "config.pbtxt is not a plain file"


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_what_the_version_is_made_of(root: Path) -> None:
    first = put_model(root, "a", "1")
    put_model(root, "a", "2")
    before = look(root)
    assert look(root).fingerprint("1") == before.fingerprint("1")
    (first / "weights.bin").write_bytes(b"1")
    after = look(root)
    assert after.fingerprint("1") != before.fingerprint("1")
    assert after.fingerprint("2") == before.fingerprint("2")
    assert after.whole_fingerprint != before.whole_fingerprint


def test_a_file_of_the_same_size_and_time_in_its_place_is_seen(root: Path) -> None:
    file = put_model(root, "a") / "model.onnx"
    before = look(root)
    content, times = file.read_bytes(), file.stat()
    other = root / "a" / "new"
    other.write_bytes(content[:-1] + b"\0")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, file)
    assert look(root).fingerprint("1") != before.fingerprint("1")


def test_config_and_warm_up_files_belong_to_every_version(root: Path) -> None:
    put_model(root, "a", "1")
    before = look(root)
    (root / "a" / "config.pbtxt").write_text("#")
    with_config = look(root)
    assert with_config.fingerprint("1") != before.fingerprint("1")
    (root / "a" / "warmup").mkdir()
    (root / "a" / "warmup" / "x").write_text("1")
    assert look(root).fingerprint("1") != with_config.fingerprint("1")


def test_files_deep_inside_count_and_endless_depth_does_not(root: Path) -> None:
    folder = put_model(root, "a")
    deep = folder.joinpath(*["d"] * 10)
    deep.mkdir(parents=True)
    (deep / "f").write_text("1")
    assert ("/".join(["d"] * 10) + "/f") in [entry[0] for entry in look(root).versions["1"].fingerprint]
    folder.joinpath(*["d"] * 30).mkdir(parents=True)
    assert look(root).versions["1"].problem == "version folder 1 nests deeper than 16 folders"


def test_a_linked_folder_is_not_entered(root: Path) -> None:
    folder = put_model(root, "a")
    (folder / "loop").symlink_to(folder)
    assert [entry[0] for entry in look(root).versions["1"].fingerprint] == ["loop", "model.onnx"]


def test_more_files_than_a_model_has_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.source._MOST_FILES", 5)
    folder = put_model(root, "a")
    for number in range(6):
        (folder / str(number)).write_text("")
    assert look(root).versions["1"].problem == "version folder 1 has more than 5 files"


# -- the watcher -------------------------------------------------------------------------------------------------------


def test_a_watcher_gives_out_what_two_looks_found_the_same(root: Path) -> None:
    put_model(root, "a")
    watcher = Watcher(Repository(root))
    assert watcher.look() == ({}, {"a"})
    settled, present = watcher.look()
    assert (set(settled), present) == ({"a"}, {"a"})
    (root / "a" / "1" / "weights.bin").write_bytes(b"half")
    assert watcher.look()[0] == {}
    (root / "a" / "1" / "weights.bin").write_bytes(b"half and half")
    assert watcher.look()[0] == {}
    assert set(watcher.look()[0]) == {"a"}


def test_a_model_is_gone_when_two_looks_did_not_find_it(root: Path) -> None:
    (root / "a").mkdir()
    watcher = Watcher(Repository(root))
    watcher.look()
    (root / "a").rmdir()
    assert watcher.look() == ({}, {"a"})
    assert watcher.look() == ({}, set())
