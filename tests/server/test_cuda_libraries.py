"""Which of CUDA's libraries are opened, and in which order."""

from __future__ import annotations

from pathlib import Path

from server.cuda_libraries import choose, preload, wheel_files


def test_libraries_come_in_the_order_of_their_dependencies() -> None:
    files = [
        Path("nvidia/cudnn/lib/libcudnn.so.9"),
        Path("nvidia/cu13/lib/libcublas.so.13"),
        Path("nvidia/cu13/lib/libcublasLt.so.13"),
        Path("nvidia/cu13/lib/libcudart.so.13"),
    ]
    assert [file.name for file in choose(files)] == [
        "libcudart.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcudnn.so.9",
    ]


def test_what_is_not_a_library_or_not_needed_is_left_alone() -> None:
    files = [
        Path("nvidia/cudnn/lib/libcudnn_ops.so.9"),
        Path("nvidia/cu13/include/cublas.h"),
        Path("nvidia/cu13/lib/libcusparse.so.12"),
    ]
    assert choose(files) == []


def test_without_nvidia_wheels_nothing_is_opened() -> None:
    assert preload() == [path.name for path in choose(wheel_files())]
