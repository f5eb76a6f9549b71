"""setup.py, called as pip calls it: what it builds, and how one learns that it did not."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import subprocess
import sys
import termios
import zipfile
from pathlib import Path

import pytest

from clipfast.kernels import cpu_library

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
# stands for CMake: configuring does nothing, building does what the test says
CMAKE = """#!/bin/sh
case "$*" in *--build*) ;; *) echo "$*" | sed 's/.*CLIPFAST_OUTPUT=//' > output; exit 0 ;; esac
{build}
"""
BUILT = 'touch "$(cat output)/libclipfast_cpu.so"'
FAILS = "echo '[ 50%] Building'; echo 'csrc/x.h:1:2: error: no such type'; echo 'make: Error 1'; exit 1"
FAILS_IN_CMAKE = r"printf 'CMake Error at CMakeLists.txt:9 (message):\n  needs\n  GCC\n\n\nmore\n'; exit 1"


@pytest.fixture
def source(tmp_path) -> Path:
    """The least that setup.py makes a wheel of, and a PATH with nothing but what a fake CMake needs."""
    tree = tmp_path / "source"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "clipfast/__init__.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "clipfast" / "kernels").mkdir()
    (tree / "clipfast" / "kernels" / "__init__.py").touch()
    shutil.copytree(ROOT / "clipfast" / "data", tree / "clipfast" / "data")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "sed", "cat", "touch", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    return tree


def install(source: Path, cmake: str | None = None, **switches: str) -> tuple[int, str, Path | None]:
    """Build a wheel at a terminal.   cmake: what the fake one does to build; without, there is none and no g++.

    Returns: exit status, what the terminal showed, the wheel.
    """
    tools = source.parent / "tools"
    environment = {"PATH": str(tools), "CUDA_HOME": "", "CLIPFAST_CUDA": "0", **switches}
    if cmake is not None:
        (tools / "cmake").write_text(CMAKE.format(build=cmake))
        (tools / "cmake").chmod(0o755)
        environment["CXX"] = "g++"
    terminal, inside = pty.openpty()

    def at_a_terminal() -> None:
        os.setsid()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-c", BUILD, str(source.parent)]
    # pip keeps what a build prints to itself
    done = subprocess.run(
        command, env=environment, cwd=source, capture_output=True, text=True, check=False, preexec_fn=at_a_terminal
    )
    os.set_blocking(terminal, False)
    try:
        shown = os.read(terminal, 1 << 16).decode().replace("\r\n", "\n")
    except BlockingIOError:
        shown = ""
    os.close(inside), os.close(terminal)
    name = done.stdout.splitlines()[-1] if done.returncode == 0 else ""
    return done.returncode, shown if done.returncode == 0 else done.stderr, source.parent / name if name else None


@pytest.mark.parametrize(
    ("cmake", "why"),
    [
        (None, "g++ and cmake were not found"),
        (FAILS, "csrc/x.h:1:2: error: no such type"),
        (FAILS_IN_CMAKE, "needs GCC"),
    ],
)
def test_a_library_that_was_not_built_is_told_in_one_line(source, cmake, why, monkeypatch):
    # an interpreter's own folder may hold CMake
    setup = source / "setup.py"
    setup.write_text(setup.read_text().replace("Path(sys.executable).parent", 'Path("nowhere")'))
    status, shown, wheel = install(source, cmake)
    assert status == 0
    slower = "linear layers, attention and patch embedding on a CPU"
    line = f"clipfast: libclipfast_cpu was not built, {slower} will be slower: {why}"
    assert shown.strip().splitlines() == [line]
    assert wheel.name.endswith("-0_without_libclipfast_cpu-py3-none-any.whl"), "pip shows this name"
    with zipfile.ZipFile(wheel) as files:
        assert files.read("clipfast/kernels/libclipfast_cpu.txt").decode() == why + "\n"
        files.extract("clipfast/kernels/libclipfast_cpu.txt", source.parent)
    # and from there into what the doctor says
    library = source.parent / "clipfast" / "kernels" / "libclipfast_cpu.so"
    assert cpu_library.LIBRARY.load(library).startswith(f"the CPU library is not built ({why}); in the folder")

    status, shown, _ = install(source, cmake, CLIPFAST_CPU="1")
    assert status == 1 and f"libclipfast_cpu was not built (CLIPFAST_CPU=1 requires it): {why}" in shown


def test_what_was_built_is_quiet_and_leaves_no_note(source):
    install(source, FAILS)
    status, shown, wheel = install(source, BUILT)
    assert (status, shown) == (0, "")
    assert "without" not in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as files:
        libraries = [name for name in files.namelist() if "libclipfast" in name]
    assert libraries == ["clipfast/kernels/libclipfast_cpu.so"]
    status, shown, wheel = install(source, BUILT, CLIPFAST_CPU="0")
    assert (status, shown) == (0, "") and wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize("moved", [True, False])
def test_what_was_compiled_elsewhere_is_compiled_anew(source, moved):
    """CMake refuses a build folder that came along with a checkout."""
    build = source / "build" / "cmake-cpu"
    build.mkdir(parents=True)
    home = "/elsewhere" if moved else source
    (build / "CMakeCache.txt").write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={home}\n")
    status, shown, _ = install(source, BUILT)
    assert (status, shown) == (0, "") and build.exists() != moved


def test_a_long_build_shows_that_it_lives(source):
    setup = source / "setup.py"
    setup.write_text(setup.read_text().replace("PAUSE = 20", "PAUSE = 0.1"))
    status, shown, _ = install(source, f"sleep 1; {BUILT}")
    assert status == 0
    assert shown.count("clipfast: compiling libclipfast_cpu.so with g++, ") > 2 and " s so far\n" in shown


def test_the_advice_is_for_a_checkout_or_for_a_copy(tmp_path, monkeypatch):
    from clipfast.kernels import shared_library

    command = "in the folder of clipfast's source, with GCC 11 or later: CLIPFAST_CPU=1 pip install"
    monkeypatch.setattr(shared_library, "FOLDER", tmp_path / "site-packages" / "clipfast" / "kernels")
    assert cpu_library.LIBRARY.build == f"{command} ."
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "setup.py").touch()
    assert cpu_library.LIBRARY.build == f"{command} -e ."
