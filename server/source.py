"""What a model repository directory holds: DIR/<model>/<version>/model.onnx and DIR/<model>/config.pbtxt.

A look is a value: names, version folders, the configuration's text and fingerprints that change when a file does. Names
are taken by allow-list; links are followed only while they stay inside the repository; what does not look like a model
or a version is left alone. Whether a file's content is any good is for the loader to find out.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.model_config import MOST_CONFIG_BYTES, is_plain_name
from server.versions import parse_version

CONFIG_NAME = "config.pbtxt"

# A model folder with more files than this is not a model; the walk ends there.
_MOST_FILES = 100_000
_MOST_DEPTH = 16

_VERSION_NAME = re.compile(r"[0-9][0-9A-Za-z.+-]{0,127}")

# (path below the folder, mtime in ns, size, inode) of each file.
Fingerprint = tuple[tuple[str, int, int, int], ...]


class SourceError(Exception):
    """A folder or file of the repository cannot be used. The message has no path above the model's folder."""


@dataclass(frozen=True, slots=True)
class VersionFolder:
    """One version as it lies on disk."""

    text: str  # the folder's name, which is the version on the wire
    path: Path
    fingerprint: Fingerprint = ()
    problem: str = ""  # why it cannot be used


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model as it lies on disk."""

    name: str
    root: Path  # the repository that nothing may leave
    path: Path
    config_text: str = ""  # "" when there is no config.pbtxt
    versions: Mapping[str, VersionFolder] = field(default_factory=dict)
    common: Fingerprint = ()  # files that belong to all versions (warm-up data)
    problem: str = ""  # why no version can be used

    def fingerprint(self, version: str) -> tuple[object, ...]:
        """Differs from another look's when something that the version is made of has changed."""
        return self.config_text, self.common, self.versions[version].fingerprint

    @property
    def whole_fingerprint(self) -> tuple[object, ...]:
        """Differs from another look's when anything of the model has changed."""
        versions = tuple((text, folder.fingerprint, folder.problem) for text, folder in sorted(self.versions.items()))
        return self.config_text, self.common, self.problem, versions

    def model_path(self, version: str, filename: str) -> Path:
        """The version's model file. Raises SourceError when it is missing, a link out of the repository, or no file."""
        folder = self.versions[version]
        if folder.problem:
            raise SourceError(folder.problem)
        path = folder.path / filename
        try:
            _check_inside(path, self.root, f"{version}/{filename}")
            mode = path.stat().st_mode
        except FileNotFoundError as error:
            raise SourceError(f"version folder {version} has no {filename}") from error
        except OSError as error:
            raise SourceError(f"{version}/{filename} cannot be looked at: {error.strerror}") from error
        if not stat.S_ISREG(mode):
            raise SourceError(f"{version}/{filename} is not a plain file")
        return path


def is_version_name(name: str) -> bool:
    """Whether a folder's name is a version: an integer or a semantic version, without leading zeros."""
    return _VERSION_NAME.fullmatch(name) is not None and parse_version(name) is not None


class Repository:
    """One repository directory. Stateless: every question is a look at the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def has(self, name: str) -> bool:
        """Whether there is a folder of a model of that name."""
        return is_plain_name(name) and (self._root / name).is_dir()

    def version_names(self, name: str) -> list[str]:
        """The names of a model's version folders, unsorted; [] when there is no such model. No file is looked at."""
        if not is_plain_name(name):
            return []
        try:
            with os.scandir(self._root / name) as entries:
                return [entry.name for entry in entries if is_version_name(entry.name) and entry.is_dir()]
        except OSError:
            return []  # Gone, or not to be read: model() says why to whoever loads it.

    def names(self) -> list[str]:
        """Models by name: folders whose name we take. Raises SourceError when the directory cannot be read."""
        try:
            with os.scandir(self._root) as entries:
                return sorted(entry.name for entry in entries if is_plain_name(entry.name) and entry.is_dir())
        except OSError as error:
            raise SourceError(f"the model repository cannot be read: {error.strerror}") from error

    def model(self, name: str) -> ModelFolder | None:
        """One look at a model; None when the repository has none of that name. Problems are part of the value."""
        if not is_plain_name(name):
            return None
        path = self._root / name
        if not path.is_dir():
            return None
        try:
            _check_inside(path, self._root, "the model's folder")
            config_text = self._config_text(path)
            versions = {folder.text: folder for folder in self._versions(path)}
            common = tuple(_files(path / "warmup"))
        except SourceError as error:
            return ModelFolder(name, self._root, path, problem=str(error))
        except OSError as error:
            return ModelFolder(name, self._root, path, problem=f"the model's folder cannot be read: {error.strerror}")
        return ModelFolder(name, self._root, path, config_text, versions, common)

    def _config_text(self, folder: Path) -> str:
        path = folder / CONFIG_NAME
        if not os.path.lexists(path):
            return ""
        _check_inside(path, self._root, CONFIG_NAME)
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise SourceError(f"{CONFIG_NAME} is not a plain file")
        if info.st_size > MOST_CONFIG_BYTES:
            raise SourceError(f"{CONFIG_NAME} is larger than {MOST_CONFIG_BYTES} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{CONFIG_NAME} is not UTF-8") from error

    def _versions(self, folder: Path) -> Iterator[VersionFolder]:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_version_name(entry.name) and entry.is_dir())
        for name in names:
            path = folder / name
            try:
                _check_inside(path, self._root, f"version folder {name}")
                yield VersionFolder(name, path, tuple(_files(path)))
            except SourceError as error:
                yield VersionFolder(name, path, problem=str(error))
            except FileNotFoundError:
                continue  # Removed while we looked.
            except OSError as error:
                yield VersionFolder(name, path, problem=f"version folder {name} cannot be read: {error.strerror}")


def _check_inside(path: Path, root: Path, what: str) -> None:
    """Raises SourceError when links lead out of the repository, FileNotFoundError when they lead nowhere."""
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:
        raise SourceError(f"{what} is a link to itself") from error
    if not real.is_relative_to(root):
        raise SourceError(f"{what} is a link that leaves the model repository")


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of what a link leads to; of the link itself when it leads nowhere; None when the entry is gone."""
    try:
        return entry.stat()
    except OSError:
        try:
            return entry.stat(follow_symlinks=False)
        except OSError:
            return None


def _files(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    """Every file below the folder, sorted; linked folders are not entered."""
    n_files = 0
    waiting = [("", 0)]
    found: list[tuple[str, int, int, int]] = []
    while waiting:
        below, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise SourceError(f"version folder {folder.name} nests deeper than {_MOST_DEPTH} folders")
        try:
            entries = os.scandir(folder / below)
        except (FileNotFoundError, NotADirectoryError):
            continue  # Removed while we looked, or there never was one.
        with entries:
            for entry in entries:
                n_files += 1
                if n_files > _MOST_FILES:
                    raise SourceError(f"version folder {folder.name} has more than {_MOST_FILES} files")
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((name, depth + 1))
                    continue
                info = _stat(entry)
                if info is not None:
                    found.append((name, info.st_mtime_ns, info.st_size, info.st_ino))
    yield from sorted(found)


class Watcher:
    """Looks at a repository again and again and holds back what may still be in the middle of a copy.

    A model's folder counts once two looks in a row found it the same, and is gone once two in a row did not find it: a
    folder that is replaced by two renames is missing for a moment. One thread.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._last: dict[str, tuple[object, ...]] = {}

    def look(self) -> tuple[dict[str, ModelFolder], set[str]]:
        """(models whose folder has settled, names of all that are not gone). Raises SourceError when the root cannot be
        read."""
        folders = {}
        for name in self._repository.names():
            folder = self._repository.model(name)
            if folder is not None:  # None: removed while we looked
                folders[name] = folder
        seen = {name: folder.whole_fingerprint for name, folder in folders.items()}
        settled = {name: folder for name, folder in folders.items() if self._last.get(name) == seen[name]}
        present = {*folders, *self._last}
        self._last = seen
        return settled, present
