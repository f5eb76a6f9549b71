"""Builds what is in csrc/ with CMake: libclipfast where nvcc is, libclipfast_cpu where GCC is.

CLIPFAST_CUDA=1 and CLIPFAST_CPU=1 make a build that fails, or a missing compiler, an error; 0 skips it. Otherwise a
library that cannot be built is left out, and one line says why and what is slower. pip hides what a build prints, so
that line goes to the terminal; into the name of the wheel, which pip does show; and into a file that `clipfast doctor`
reads. Everything else is in pyproject.toml.
"""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# seconds between two signs of life on the terminal
PAUSE = 20


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)])
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)


def find_gcc() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def find_cmake() -> str | None:
    # pip's environment, where the cmake package may be, is not on the PATH of what it runs
    own = str(Path(sys.executable).parent)
    return shutil.which("cmake") or shutil.which("cmake", path=own)


class Library(NamedTuple):
    switch: str
    tools: tuple[str, ...]  # without cmake
    slower: str  # what is, without it


TOOLS: dict[str, tuple[Callable[[], str | None], str]] = {
    # name -> (how it is found, CMake's name of it)
    "g++": (find_gcc, "CMAKE_CXX_COMPILER"),
    "nvcc": (find_nvcc, "CMAKE_CUDA_COMPILER"),
}
LIBRARIES = {
    # nvcc compiles the host's part with g++
    "libclipfast": Library("CUDA", ("nvcc", "g++"), "patch embedding on a GPU"),
    "libclipfast_cpu": Library("CPU", ("g++",), "linear layers, attention and patch embedding on a CPU"),
}


def wanted(library: Library) -> bool:
    switch = os.environ.get(f"CLIPFAST_{library.switch}", "")
    # a machine without nvcc has no use for libclipfast; every machine has a CPU
    return switch == "1" or (switch != "0" and ("nvcc" not in library.tools or find_nvcc() is not None))


def tell(line: str) -> None:
    """On the terminal if there is one, else where `pip -v` shows it."""
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
        # pip's own line is unfinished
        terminal.write(f"\n{line}\n")
        return
    print(line, flush=True)


def run(command: list[str], doing: str) -> None:
    """Raises: CompileError with the first error among what the command printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines: list[str] = []

    def read() -> None:
        for line in process.stdout:
            lines.append(line.rstrip())
            print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    start = time.monotonic()
    while reader.is_alive():
        reader.join(PAUSE)
        if reader.is_alive():
            tell(f"clipfast: {doing}, {time.monotonic() - start:.0f} s so far")
    if process.wait():
        raise CompileError(first_error(lines) or f"{command[0]} failed")


def first_error(lines: list[str]) -> str:
    """In one line."""
    # the word alone: -Werror is no error
    place = next((i for i, line in enumerate(lines) if re.search(r"\berrors?\b", line, re.I)), len(lines) - 1)
    found = lines[place : place + 1]
    if found and found[0].startswith("CMake Error at"):
        # its text is indented below
        found = [*itertools.takewhile(lambda line: line[:1] in ("", " "), lines[place + 1 :])]
    return " ".join(" ".join(found).replace(f"{ROOT}/", "").split())[:200]


class BuildLibrary(build_ext):
    def run(self):
        if not self.inplace:
            # what an earlier build left, perhaps of a library that is not wanted now
            for path in (Path(self.build_lib) / "clipfast" / "kernels").glob("libclipfast*"):
                path.unlink()
        super().run()

    def get_ext_filename(self, fullname):
        # a plain library, not a Python module: no interpreter's suffix
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        file = Path(self.get_ext_fullpath(ext.name)).resolve()
        library = LIBRARIES[file.stem]
        note = file.with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        for path in (file, note):
            path.unlink(missing_ok=True)
        try:
            self._build(library, file)
        except (OSError, CompileError) as error:
            if not ext.optional:
                told = f"{file.stem} was not built (CLIPFAST_{library.switch}=1 requires it): {error}"
                raise CompileError(told) from error
            note.write_text(f"{error}\n")
            tell(f"clipfast: {file.stem} was not built, {library.slower} will be slower: {error}")

    def _build(self, library: Library, file: Path) -> None:
        tools = {name: TOOLS[name][0]() for name in library.tools} | {"cmake": find_cmake()}
        if missing := [name for name, path in tools.items() if path is None]:
            raise CompileError(f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not found")
        # kept between builds, so that an installation where nothing changed compiles nothing
        build = ROOT / "build" / f"cmake-{library.switch.lower()}"
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # the checkout was moved or copied, and CMake refuses
        options = [f"-DCLIPFAST_{each.switch}={'ON' if each is library else 'OFF'}" for each in LIBRARIES.values()]
        options += [f"-D{TOOLS[name][1]}={tools[name]}" for name in library.tools]
        doing = f"compiling {file.name} with {library.tools[0]}"
        if "nvcc" in library.tools:
            tell(f"clipfast: {doing}, which takes minutes; CLIPFAST_CUDA=0 leaves it out")
        run([tools["cmake"], "-S", str(ROOT), "-B", str(build), *options, f"-DCLIPFAST_OUTPUT={file.parent}"], doing)
        run([tools["cmake"], "--build", str(build), "--parallel", str(os.cpu_count())], doing)


class Wheel(bdist_wheel):
    """For any Python 3, since nothing in it is compiled against one."""

    def get_tag(self):
        built = [name for name in LIBRARIES if self._here(f"{name}.so")]
        left_out = [name for name in LIBRARIES if self._here(f"{name}.txt")]
        if left_out:
            # pip says of a build no more than the name of its wheel
            self.build_number = "_".join(["0_without", *left_out])
        *_, platform = super().get_tag()
        return ("py3", "none", platform if built else "any")

    def _here(self, name: str) -> bool:
        return (Path(self.bdist_dir) / "clipfast" / "kernels" / name).exists()


def extensions():
    for name, library in LIBRARIES.items():
        if wanted(library):
            optional = os.environ.get(f"CLIPFAST_{library.switch}") != "1"
            yield Extension(f"clipfast.kernels.{name}", sources=[], optional=optional)


setup(ext_modules=[*extensions()], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
