"""Fills Triton's cache with the headline's launches, and asks a cache for them as a run on a GPU would.

    TRITON_CACHE_DIR=folder python -m benchmarks.gpu.precompile fill|ask

The last line printed is a JSON object. fill: `entries`, the folders of the cache that belong to the launches;
`launches`, their number; `python`, `triton` and `libtriton`, what compiled them; `without`, why there are no modules in
C, or "". ask: `line`, in words; `missed`, the kernels that were not in the cache; `modules`, how many in C were, or 0
if any was not. Both need the Triton of the GPU machine, and no GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build

from benchmarks import compilation
from benchmarks.gpu import cache, kit, tower_launches
from benchmarks.gpu.kit_parts import ARCHITECTURE
from clipfast import tuning


class Driver(compilation.Driver):
    """Lets a launch go all the way, and launches nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": tuning.SHARED_MEMORY[device]},
        load_binary=lambda *_: (0, 0, 0, 0, 1024),
    )

    def __init__(self, architecture: int):
        super().__init__(architecture)
        self.launched: list[tuple[Any, Any]] = []

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        self.launched.append((src, metadata))
        return lambda *_: None


def make_launches(cases: Iterable[Callable[[], None]], architecture: int = ARCHITECTURE) -> Driver:
    """Makes the calls with a driver that launches nothing; Triton compiles, or finds in its cache, as on a GPU."""
    made = Driver(architecture)
    triton.runtime.driver.set_active(made)
    with tower_launches.on_triton(), tuning.assume(architecture):
        for case in cases:
            case()
    return made


def fill(cases: Iterable[Callable[[], None]], processes: int) -> dict[str, Any]:
    with tower_launches.on_triton():
        launches = compilation.collect(cases, [ARCHITECTURE])
    if processes == 1:
        entries = [*map(_compile, launches)]
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            entries = [*pool.map(_compile, launches)]
    about = {
        "python": "{}.{}".format(*sys.version_info),
        "triton": triton.__version__,
        "libtriton": kit.build_of_triton(),
    }
    return {"launches": len(launches), "entries": entries, **about}


def _compile(launch: compilation.Launch) -> str:
    """Into the cache; returns the entry's name."""
    triton.runtime.driver.set_active(Driver(launch.architecture))
    kernel = getattr(importlib.import_module(launch.module), launch.kernel).preload(launch.specialization)
    return Path(next(iter(kernel.metadata_group.values()))).parent.name


def ask(cases: Iterable[Callable[[], None]]) -> tuple[dict[str, Any], Driver]:
    hits = cache.count()
    made = make_launches(cases)
    return {"line": hits.line(), "missed": [*hits.compiled]}, made


# ---------------------------------------------------------------------------------------------------------------------
# The modules in C


# with and without the command `file`
LINKAGES = ("ELF", "")


def modules(launched: Iterable[tuple[Any, Any]], *, compile: bool) -> list[str]:
    """The entries of the module that loads cubins and of each launcher, under both of their names.

    compile: make those that are missing, else raise.
    Raises:  RuntimeError without a C compiler, subprocess.CalledProcessError where it fails (without Python's headers).
    """
    entries: dict[str, None] = {}
    launched = list(launched)

    def load(name: str, path: str) -> Any:
        entries[Path(path).parent.name] = None
        return mock.MagicMock()  # it would not load: libcuda is not here

    def refuse(name: str, *_: Any) -> str:
        raise RuntimeError(f"{name} is not in the cache")

    machine, system, bits, _ = build.platform_key().split(",")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(build, "_load_module_from_path", load))
        if compile:
            stack.enter_context(_libcuda())
        else:
            stack.enter_context(mock.patch.object(build, "_build", refuse))
            stack.enter_context(mock.patch.object(nvidia, "library_dirs", list))
        for linkage in LINKAGES:
            key = ",".join([machine, system, bits, linkage])
            stack.enter_context(mock.patch.object(build, "platform_key", lambda key=key: key))
            nvidia.CudaUtils().__init__()
            for each in launched:
                nvidia.CudaLauncher(*each)
    return [*entries]


@contextlib.contextmanager
def _libcuda() -> Iterator[None]:
    """A libcuda to link against; at run time the loader finds the driver's."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / nvidia.libraries[0]
        command = [compiler, "-shared", f"-Wl,-soname,{library.name}", "-o", library, "-xc", "-"]
        # one symbol that both kinds use, or the linker would leave the library out
        subprocess.run(command, input="int cuGetErrorString(void) { return 0; }", text=True, check=True)
        with mock.patch.object(nvidia, "library_dirs", return_value=[folder]):
            yield


def main(argv: list[str]) -> int:
    found: dict[str, Any]
    if argv == ["fill"]:
        found = fill(tower_launches.cases(), os.cpu_count() or 1)
        made = make_launches(tower_launches.cases())
        try:
            found |= {"entries": found["entries"] + modules(made.launched, compile=True), "without": ""}
        except (RuntimeError, subprocess.CalledProcessError) as error:
            found["without"] = str(error)
    elif argv == ["ask"]:
        found, made = ask(tower_launches.cases())
        try:
            found["modules"] = len(modules(made.launched, compile=False))
        except RuntimeError:
            found["modules"] = 0
    else:
        print(__doc__, file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
