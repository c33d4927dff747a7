"""Builds `server._native` from ext/ and `protos.gen` from protos/.

The native module is built here rather than by setuptools because ext/ is large: each file is compiled on its own, in
parallel, and only when it, a header it includes or a flag has changed.

    python setup.py build_ext --inplace     the module into server/, the messages into protos/gen/
    python setup.py build_native_tests      each ext/test/*_test.cc and ext/fuzz/*.cc as a program

Environment: CXX; TIDEGATE_SANITIZE=address|thread and TIDEGATE_DEBUG=1 choose another flavour. A flavour other than
the release one stays in build/ext/<flavour>/server, where TIDEGATE_NATIVE_DIR makes `import server._native` find it.
TIDEGATE_NATIVE=0 leaves the module out (for tools that only need the Python side).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXT = Path("ext")
PYX = EXT / "bind" / "_native.pyx"
PROTOS = Path("protos")
GENERATED = PROTOS / "gen"
MODULE = "server._native"
# Programs, not part of the module.
APART = (EXT / "test", EXT / "fuzz")

LIBRARIES = {"libnghttp2": "nghttp2", "zlib": "z"}
SYSTEM_PACKAGES = "libnghttp2-dev zlib1g-dev pkg-config"

# Functions that distributions have back-ported below the version that announces them: only trying tells.
PROBES = {
    "TIDEGATE_HAVE_STREAM_RESET_RATE_LIMIT": "nghttp2_option_set_stream_reset_rate_limit(o, 1, 1);",
    "TIDEGATE_HAVE_GLITCH_RATE_LIMIT": "nghttp2_option_set_glitch_rate_limit(o, 1, 1);",
}

INCLUDES = ["-I", str(EXT), "-I", str(EXT / "decl"), "-I", str(EXT / "bind")]
WARNINGS = ["-Wall", "-Wextra", "-Werror=vla", "-Walloca"]
# What Cython writes is not ours to tidy.
GENERATED_CODE = ["-Wno-unused-function", "-Wno-unused-variable", "-Wno-unused-parameter", "-Wno-cpp"]


class BuildError(SystemExit):
    """Ends the build with a message and no traceback."""

    def __init__(self, message: str) -> None:
        print(f"\nerror: {message}", file=sys.stderr, flush=True)
        super().__init__(1)


def say(message: str) -> None:
    print(message, flush=True)


def call(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def build_lock() -> Iterator[None]:
    """Two builds of one tree wait for each other."""
    Path("build").mkdir(exist_ok=True)
    with open("build/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- what to build with ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flavour:
    """One way to compile: its own flags, its own folder of objects."""

    name: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path("build") / "ext" / self.name

    @property
    def is_release(self) -> bool:
        return self.name == "release"


def chosen_flavour() -> Flavour:
    sanitize = os.environ.get("TIDEGATE_SANITIZE", "")
    if sanitize == "address":
        return Flavour("address", ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
                                   "-fno-sanitize-recover=undefined"))  # fmt: skip
    if sanitize == "thread":
        return Flavour("thread", ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=thread"))
    if sanitize:
        raise BuildError(f"TIDEGATE_SANITIZE={sanitize}: use address or thread")
    if os.environ.get("TIDEGATE_DEBUG") == "1":
        return Flavour("debug", ("-O0", "-g3", "-D_GLIBCXX_ASSERTIONS"))
    return Flavour("release", ("-O2", "-g1", "-fno-plt", "-DNDEBUG"))


@dataclasses.dataclass(frozen=True)
class Toolchain:
    compiler: tuple[str, ...]
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    defines: tuple[str, ...]


def find_toolchain(flavour: Flavour) -> Toolchain:
    compiler = tuple(shlex.split(os.environ.get("CXX", "g++")))
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"no C++ compiler: {compiler[0]} is not on the path (install g++ or set CXX)")
    includes: list[str] = []
    libraries: list[str] = []
    for package, names in LIBRARIES.items():
        has_config = (
            shutil.which("pkg-config") is not None and call(["pkg-config", "--exists", package]).returncode == 0
        )
        if has_config:
            includes += shlex.split(call(["pkg-config", "--cflags", package]).stdout)
            libraries += shlex.split(call(["pkg-config", "--libs", package]).stdout)
        else:
            libraries += [f"-l{name}" for name in names.split()]
    # Their headers answer to their own warnings.
    includes = [flag.replace("-I", "-isystem", 1) for flag in includes]
    libraries += ["-ldl", "-lpthread"]
    defines = probe(compiler, includes, libraries, flavour)
    return Toolchain(compiler, tuple(includes), tuple(dict.fromkeys(libraries)), defines)


def probe(compiler: Sequence[str], includes: list[str], libraries: list[str], flavour: Flavour) -> tuple[str, ...]:
    """The defines for what the installed libraries can do. Remembered until the compiler or the headers change."""
    command = [*compiler, "-x", "c++", *includes]
    found = call([*command, "-M", "-include", "nghttp2/nghttp2.h", "-include", "zlib.h", "/dev/null"])  # fmt: skip
    if found.returncode != 0:
        raise BuildError(
            "the headers of libnghttp2 or zlib are missing. On Debian and Ubuntu:\n"
            f"    apt-get install {SYSTEM_PACKAGES}\n{found.stderr.strip()}"
        )
    header = next(word for word in found.stdout.split() if word.endswith("nghttp2/nghttp2.h"))
    key = [*command, *libraries, header, str(os.stat(header).st_mtime), str(sorted(PROBES.items()))]
    cache = flavour.folder / "probe.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
        if known["key"] == key:
            return tuple(known["defines"])
    flavour.folder.mkdir(parents=True, exist_ok=True)
    source, program = flavour.folder / "probe.cc", flavour.folder / "probe"
    defines = []
    for define, statement in PROBES.items():
        source.write_text(
            "#include <nghttp2/nghttp2.h>\n"
            f"int main() {{ nghttp2_option* o; nghttp2_option_new(&o); {statement} return 0; }}\n"
        )
        if call([*command, source, "-x", "none", "-o", program, *libraries]).returncode == 0:
            defines.append(f"-D{define}=1")
    cache.write_text(json.dumps({"key": key, "defines": defines}))
    return tuple(defines)


# --- compile what changed --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One file made from others by one command, which leaves the list of what it read in `depfile`.

    `command` writes to `output` + ".new" and is run only when something it reads, or the command itself, has changed.
    """

    output: Path
    source: Path
    command: tuple[str, ...]
    depfile: Path

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".new")

    @property
    def command_file(self) -> Path:
        return self.output.with_name(self.output.name + ".cmd")

    def is_current(self) -> bool:
        try:
            made = self.output.stat().st_mtime_ns
            if self.command_file.read_text() != shlex.join(self.command):
                return False
            return all(os.stat(path).st_mtime_ns <= made for path in dependencies(self.depfile))
        except OSError:
            return False

    def run(self) -> str | None:
        """Returns what went wrong."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        started = time.time_ns()
        done = call(self.command)
        if done.stderr:
            print(done.stderr, end="", file=sys.stderr, flush=True)
        if done.returncode != 0:
            return str(self.source)
        # An edit made while the compiler ran must not look older than the result.
        os.utime(self.partial, ns=(started, started))
        os.replace(self.partial, self.output)
        self.command_file.write_text(shlex.join(self.command))
        return None


def dependencies(depfile: Path) -> list[str]:
    """The files named on the right of a make rule."""
    text = depfile.read_text().replace("\\\n", " ").replace("\\ ", "\0")
    right = text.split(":", 1)[1].splitlines()[0]
    return [word.replace("\0", " ") for word in right.split()]


def run_steps(steps: Sequence[Step], verb: str) -> None:
    waiting = [step for step in steps if not step.is_current()]
    if not waiting:
        return
    say(f"{verb} {len(waiting)} of {len(steps)} files")
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(jobs) as pool:
        failed = [source for source in pool.map(Step.run, waiting) if source]
    if failed:
        raise BuildError(f"{verb} failed for " + ", ".join(failed))


def cython_step(folder: Path) -> Step:
    output = folder / "bind" / "_native.cpp"
    partial = output.with_name(output.name + ".new")
    command = (sys.executable, "-m", "cython", "-3", "--cplus", "--depfile", "--module-name", MODULE,
               *INCLUDES, str(PYX), "-o", str(partial))  # fmt: skip
    return Step(output, PYX, command, partial.with_name(partial.name + ".dep"))


def object_step(source: Path, flavour: Flavour, tools: Toolchain, extra: Sequence[str] = ()) -> Step:
    inside = source.relative_to(flavour.folder) if source.is_relative_to(flavour.folder) else source.relative_to(EXT)
    output = flavour.folder / "objects" / inside.with_suffix(".o")
    partial = output.with_name(output.name + ".new")
    depfile = output.with_suffix(".d")
    command = (*tools.compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", *flavour.flags, *WARNINGS,
               *tools.defines, *INCLUDES, *tools.includes, *extra,
               "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(partial))  # fmt: skip
    return Step(output, source, command, depfile)


def link(output: Path, objects: Sequence[Path], flavour: Flavour, tools: Toolchain, *, shared: bool) -> None:
    """Links when an object is newer, in one move: a process that runs the old file keeps it."""
    partial = output.with_name(output.name + ".new")
    command = [*tools.compiler, "-pthread", *flavour.flags, *(["-shared"] if shared else []), *map(str, objects),
               "-o", str(partial), "-Wl,-z,relro,-z,now", *tools.libraries]  # fmt: skip
    command_file = flavour.folder / "links" / (output.name + ".cmd")
    with contextlib.suppress(OSError):
        newest = max(path.stat().st_mtime_ns for path in objects)
        if command_file.read_text() == shlex.join(command) and output.stat().st_mtime_ns >= newest:
            return
    say(f"linking {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    done = call(command)
    if done.returncode != 0:
        raise BuildError(f"linking {output} failed\n{done.stderr}")
    os.replace(partial, output)
    command_file.parent.mkdir(parents=True, exist_ok=True)
    command_file.write_text(shlex.join(command))


def core_sources() -> list[Path]:
    return sorted(path for path in EXT.rglob("*.cc") if not any(path.is_relative_to(folder) for folder in APART))


def build_module(output: Path) -> None:
    if not PYX.exists():
        raise BuildError(f"{PYX} is missing: without it there is no module to build")
    flavour = chosen_flavour()
    tools = find_toolchain(flavour)
    sources = core_sources()
    if not sources:
        say(f"no C++ sources under {EXT}/: the module holds the binding alone")
    binding = cython_step(flavour.folder)
    run_steps([binding], "cython:")
    python = ("-isystem", sysconfig.get_paths()["include"], *GENERATED_CODE)
    steps = [object_step(source, flavour, tools) for source in sources]
    # The binding takes longest, so it starts first.
    steps.insert(0, object_step(binding.output, flavour, tools, python))
    run_steps(steps, f"compiling ({flavour.name})")
    link(output, [step.output for step in steps], flavour, tools, shared=True)


def build_programs() -> list[Path]:
    """Every ext/test/*_test.cc and ext/fuzz/*.cc, each linked with the other files of its folder's core."""
    flavour = chosen_flavour()
    tools = find_toolchain(flavour)
    mains = [*sorted((EXT / "test").glob("*_test.cc")), *sorted((EXT / "fuzz").glob("*.cc"))]
    helpers = [path for path in sorted((EXT / "test").glob("*.cc")) if path not in mains]
    shared = [object_step(path, flavour, tools) for path in (*core_sources(), *helpers)]
    own = [object_step(path, flavour, tools) for path in mains]
    run_steps([*shared, *own], f"compiling ({flavour.name})")
    programs = []
    for main, step in zip(mains, own, strict=True):
        program = flavour.folder / "bin" / main.stem
        link(program, [step.output, *(other.output for other in shared)], flavour, tools, shared=False)
        programs.append(program)
    return programs


# --- messages --------------------------------------------------------------------------------------------------------


def generate_protos() -> None:
    """protos/**.proto -> protos/gen/*_pb2.py and .pyi, with relative imports and in our own descriptor pool."""
    sources = sorted(PROTOS.rglob("*.proto"))
    stamp = GENERATED / "__init__.py"
    with contextlib.suppress(OSError):
        newest = max(path.stat().st_mtime_ns for path in (*sources, Path(__file__)))
        expected = [module_of(source) for source in sources]
        if stamp.stat().st_mtime_ns >= newest and all(path.exists() for path in expected):
            return
    from grpc_tools import protoc  # noqa: PLC0415  a build without changes does not need it

    say(f"protoc: {len(sources)} files")
    fresh = GENERATED.with_name("gen.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    names = [str(source.relative_to(PROTOS)) for source in sources]
    arguments = ["protoc", f"-I{PROTOS}", f"--python_out={fresh}", f"--pyi_out={fresh}", *names]
    if protoc.main(arguments) != 0:
        raise BuildError("protoc refused a file of protos/")
    for module in fresh.rglob("*_pb2.py*"):
        depth = len(module.relative_to(fresh).parts)
        module.write_text(adopt(module.read_text(), depth))
    for folder in (fresh, *(path for path in fresh.rglob("*") if path.is_dir())):
        (folder / "__init__.py").write_text('"""Generated from protos/*.proto by setup.py."""\n')
    shutil.rmtree(GENERATED, ignore_errors=True)
    os.replace(fresh, GENERATED)


def module_of(source: Path) -> Path:
    return GENERATED / source.relative_to(PROTOS).with_name(source.stem + "_pb2.py")


def adopt(text: str, depth: int) -> str:
    """Generated code that imports its neighbours and registers its messages where `protos` says."""
    up = "." * depth
    return "\n".join(adopted_line(line, up) for line in text.splitlines()) + "\n"


def adopted_line(line: str, up: str) -> str:
    words = line.split()
    if "_pb2" in line and "google.protobuf" not in line and words[0] == "import":
        return f"from {up} {line}"
    if "_pb2" in line and "google.protobuf" not in line and words[0] == "from":
        return line.replace(f"from {words[1]}", f"from {up}{words[1]}", 1)
    if line == "from google.protobuf import descriptor_pool as _descriptor_pool":
        return f"from {up}. import POOL as _POOL"
    return line.replace("_descriptor_pool.Default()", "_POOL")


# --- commands --------------------------------------------------------------------------------------------------------


class BuildNative(build_ext):
    def run(self) -> None:
        os.chdir(ROOT)
        # The base class clears `inplace` while it builds.
        self._is_in_place = bool(self.inplace)
        with build_lock():
            generate_protos()
            super().run()

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("TIDEGATE_NATIVE") == "0":
            say(f"TIDEGATE_NATIVE=0: {ext.name} is left out")
            return
        name = self.get_ext_filename(ext.name)
        output = Path(name) if self._is_in_place else Path(os.path.relpath(self.get_ext_fullpath(ext.name), ROOT))
        if not chosen_flavour().is_release:
            output = chosen_flavour().folder / "server" / output.name
        build_module(output)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: with --inplace the module is linked where it is used."""


class BuildNativeTests(Command):
    description = "build the programs of ext/test and ext/fuzz"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        os.chdir(ROOT)
        with build_lock():
            for program in build_programs():
                say(str(program))


class BuildPython(build_py):
    def run(self) -> None:
        os.chdir(ROOT)
        generate_protos()
        super().run()


# protos.gen is empty before the build, so no search can find it, and metadata is made before that.
(ROOT / GENERATED).mkdir(exist_ok=True)

setup(
    packages=sorted({*find_packages(include=["server*", "controlplane*", "protos*"]), "protos.gen"}),
    package_data={"*": ["py.typed", "*.pyi"], "server.demo": ["data/*"]},
    ext_modules=[Extension(MODULE, sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "build_native_tests": BuildNativeTests},
)
