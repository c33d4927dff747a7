"""CUDA's libraries out of the `nvidia-*` wheels that `tidegate[gpu]` brings, opened before ONNX Runtime looks for them.

The runtime's CUDA provider finds its libraries where the system linker looks, and a wheel's folder is not such a place.
Opened once with their symbols shared, they are found by name. A machine that has CUDA installed needs none of this.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import re
from collections.abc import Iterable
from pathlib import Path

_LOG = logging.getLogger(__name__)

# In the order of their dependencies. Each name stands for lib<name>.so.<major>.
NEEDED = ("cudart", "nvrtc", "nvJitLink", "cublasLt", "cublas", "cufft", "curand", "cudnn")

_LIBRARY = re.compile(r"lib([A-Za-z]+)\.so\.[0-9]+")


def choose(files: Iterable[Path]) -> list[Path]:
    """The needed libraries among `files`, in the order in which they can be opened. What is not there is left out."""
    found: dict[str, Path] = {}
    for file in files:
        match = _LIBRARY.fullmatch(file.name)
        if match is not None and match[1] in NEEDED:
            found.setdefault(match[1], file)
    return [found[name] for name in NEEDED if name in found]


def wheel_files() -> list[Path]:
    """Every file of the installed distributions named nvidia-*."""
    files: list[Path] = []
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.lower().startswith("nvidia-"):
            files += [Path(str(file.locate())) for file in distribution.files or ()]
    return files


def preload() -> list[str]:
    """Opens what the wheels have and returns the names of what was opened.

    A library that cannot be opened is a warning: the provider may find another one, and says so itself if it does not.
    """
    opened = []
    for path in choose(wheel_files()):
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            _LOG.warning("CUDA library %s of an installed wheel cannot be opened: %s", path.name, error)
        else:
            opened.append(path.name)
    return opened
