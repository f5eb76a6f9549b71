"""Libraries of csrc/ for the tests: the installed one if it is newer than its sources, else one that is built here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from clipfast.kernels.shared_library import SharedLibrary

ROOT = Path(__file__).resolve().parents[1]
TYPES = {"int64_t ": ctypes.c_int64, "int32_t ": ctypes.c_int32, "float ": ctypes.c_float}


def give_up(reason: str, tool: str) -> None:
    if os.environ.get("CLIPFAST_REQUIRE_PEERS") == "1" and shutil.which(tool):
        pytest.fail(f"{reason} (CLIPFAST_REQUIRE_PEERS=1: no skip)", pytrace=False)
    pytest.skip(reason)


def built(library: SharedLibrary, folder: Path, compiler: str, options: list[str]) -> Path:
    """folder: an empty one.   compiler: without which the tests skip.   options: CMake's."""
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").iterdir()]
    if library.path.exists() and library.path.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return library.path
    for tool in (compiler, "cmake"):
        if shutil.which(tool) is None:
            give_up(f"{tool} is not installed: {library.path.name} cannot be built", compiler)
    configure = ["cmake", "-S", ROOT, "-B", folder / "build", f"-DCLIPFAST_OUTPUT={folder}", *options]
    for command in (configure, ["cmake", "--build", folder / "build"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr, done.stderr
    return folder / library.path.name


@contextlib.contextmanager
def loaded_from(library: SharedLibrary, path: Path) -> Iterator[ctypes.CDLL]:
    """Inside the block it is this file, afterwards the installed one again."""
    installed = library.path
    library.forget(path)
    assert library.missing() is None
    yield library.use()
    library.forget(installed)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block PyTorch, and so the library, has this many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_header_agrees(header: str, library: SharedLibrary, struct: type[ctypes.Structure]) -> None:
    """The text of the C header has this interface: version, functions and the fields of its one struct."""
    assert f"#define {library.prefix.upper()}_ABI_VERSION {library.version}\n" in header
    name = struct.__doc__
    body = header.partition(f"{name} {{")[2].partition(f"}} {name};")[0]
    declared = [line.strip().split(";")[0] for line in body.splitlines()[1:] if line.strip()]
    assert len(declared) == len(struct._fields_)
    for line, (field, kind) in zip(declared, struct._fields_, strict=True):
        assert line.endswith((f" {field}", f"*{field}"))
        assert kind == (ctypes.c_void_p if "*" in line else TYPES[line.removesuffix(field)])
    assert all(f"{function}(" in header for function in library.symbols)


def assert_codes_agree(header: str, prefix: str, codes: Mapping[str, int]) -> None:
    for name, code in codes.items():
        assert f"{prefix}_{name.upper()} = {code}" in header


def assert_says_why_it_is_missing(library: SharedLibrary, built: Path, folder: Path, symbol: str) -> None:
    """Not built, of another version, no library, without a function: in words, with the command that mends it."""
    assert "not built" in library.load(folder / library.path.name) and library.build in library.load(folder / "x.so")
    words = (library.switch, library.needs, library.kind)
    other = SharedLibrary(library.path.name, library.prefix, 999, library.symbols, *words)
    assert f"interface version {library.version}, this clipfast needs 999" in other.load(built)
    (folder / library.path.name).write_text("not a library")
    assert "does not load" in library.load(folder / library.path.name)
    symbols = {**library.symbols, symbol: (ctypes.c_int, ())}
    more = SharedLibrary(library.path.name, library.prefix, library.version, symbols, *words)
    assert symbol in more.load(built)
