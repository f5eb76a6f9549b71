"""How each part of a kit is made; benchmarks/gpu/kit.py says what a kit is."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import cache, kit
from benchmarks.gpu.jobs import on_path

# of the GPU machine
PYTHON, TRITON, ARCHITECTURE = "3.12", "3.6.0", 90
# what it lacks of what openai/CLIP and open_clip import; openai-clip reads its version with setuptools' pkg_resources
WHEELS = ("setuptools", "ftfy", "wcwidth", "open_clip_torch")
# what finding the launches imports
NEEDED = ("torch", "numpy", "pillow", "tokenizers", "ftfy", "tqdm")
PIP = ("-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check")
# what the names of variables begin with that change Triton's keys
KEYED = ("TRITON_", "MLIR_", "LLVM_", "NVPTX_", "DISABLE_", "PTXAS_", "USE_", "ALLOW_")

Part = dict[str, Any]
Maker = Callable[[Path, dict[str, str]], Part]


class LeftOut(Exception):
    """Why a part cannot be made here, in one line."""


def makers(root: Path, python: str | None) -> dict[str, Maker]:
    """Part -> what makes it in a folder; it raises LeftOut, or notes in the mapping what a part lacks."""
    return {
        "wheels": functools.partial(wheels, root),
        "libclipfast.so": functools.partial(library, root, "libclipfast.so", "for a GPU", "nvcc"),
        "libclipfast_cpu.so": functools.partial(library, root, "libclipfast_cpu.so", "for the test suite", "g++"),
        "triton": functools.partial(triton_cache, root, python),
    }


def run(command: Sequence[str | Path], root: Path, environment: Mapping[str, str] | None = None) -> str:
    """What it prints. Raises: LeftOut with its last lines."""
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise LeftOut(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\berrors?\b", line, re.I)] or lines
        raise LeftOut(f"{Path(command[0]).name} failed: {' | '.join(errors[-3:])[-300:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Wheels


def wheels(root: Path, out: Path, left_out: dict[str, str]) -> Part:
    folder = out / "wheels"
    folder.mkdir()
    constraints = ["-c", "constraints.txt"]
    foreign = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    foreign += ["--platform=manylinux2014_x86_64", "--platform=manylinux_2_28_x86_64"]
    run([sys.executable, *PIP, "download", "--no-deps", *constraints, *foreign, "-d", folder, *WHEELS], root)
    try:
        # a source distribution only, whose build imports pkg_resources
        with tempfile.TemporaryDirectory() as tools:
            target = ["install", "--no-deps", "--no-compile", *constraints, "--target", tools]
            run([sys.executable, *PIP, *target, "setuptools", "wheel"], root)
            alone = ["wheel", "--no-deps", "--no-build-isolation", "--use-pep517", *constraints, "-w", folder]
            environment = {**os.environ, "PYTHONPATH": tools}
            run([sys.executable, *PIP, *alone, "openai-clip"], root, environment)
    except LeftOut as why:
        left_out["openai-clip"] = str(why)
    files = sorted(folder.glob("*.whl"))
    names = ", ".join(" ".join(file.name.split("-")[:2]) for file in files)
    return {
        "files": [file.relative_to(out).as_posix() for file in files],
        "purpose": f"the peers: {names}",
    }


# ---------------------------------------------------------------------------------------------------------------------
# csrc


def library(root: Path, name: str, purpose: str, compiler: str, out: Path, left_out: dict[str, str]) -> Part:
    tools = {tool: on_path(tool) for tool in ("cmake", compiler)}
    if missing := [tool for tool, path in tools.items() if path is None]:
        raise LeftOut(f"{' and '.join(missing)} not found")
    build = root / "build" / "gpu-kit" / name.partition(".")[0]
    cached = build / "CMakeCache.txt"
    if cached.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={root}\n" not in cached.read_text():
        shutil.rmtree(build)  # the checkout was moved, and CMake refuses
    off = "CLIPFAST_CPU" if compiler == "nvcc" else "CLIPFAST_CUDA"
    options = [f"-DCLIPFAST_ARCHITECTURES={ARCHITECTURE}", f"-D{off}=OFF", f"-DCLIPFAST_OUTPUT={out.absolute()}"]
    environment = {**os.environ, "CUDACXX": tools["nvcc"] or ""} if compiler == "nvcc" else None
    run([tools["cmake"], "-S", root, "-B", build, *options], root, environment)
    run([tools["cmake"], "--build", build, "--parallel"], root, environment)
    return {"files": [name], "purpose": f"csrc/ {purpose}", "sources": kit.csrc_digest(root)}


# ---------------------------------------------------------------------------------------------------------------------
# Triton's cache


def find_python(given: str | None) -> str:
    """The command of a Python 3.12. Raises: LeftOut."""
    command = given or f"python{PYTHON}"
    try:
        found = run([command, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"], Path.cwd()).strip()
    except LeftOut:
        raise LeftOut(f"{command} does not run: name one with --python, or make gpu-kit PYTHON312=") from None
    if found != PYTHON:
        raise LeftOut(f"{command} is {found}, not {PYTHON}: name one with --python, or make gpu-kit PYTHON312=")
    return command


def environment_of(root: Path, python: str) -> Path:
    """The interpreter of an environment with the GPU machine's Triton, made once for each constraints.txt."""
    venv = root / "build" / "gpu-kit" / "venv"
    stamp = venv / "made-from"
    wanted = f"{TRITON}\n{NEEDED}\n{(root / 'constraints.txt').read_text()}"
    own = venv / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        run([python, "-m", "venv", "--clear", venv], root)
        run([own, *PIP, "install", "-c", "constraints.txt", *NEEDED], root)
        # not the one that constraints.txt names
        run([own, *PIP, "install", "--no-deps", f"triton=={TRITON}"], root)
        stamp.write_text(wanted)
    return own


def triton_cache(root: Path, python: str | None, out: Path, left_out: dict[str, str]) -> Part:
    own = environment_of(root, find_python(python))
    found = precompile("fill", own, root, root / "build" / "gpu-kit" / "triton")
    if found["without"]:
        left_out["modules in C for Triton"] = found["without"]
    cache.strip(root / "build" / "gpu-kit" / "triton", found["entries"], out / "triton")
    line = check(own, root, out / "triton", with_modules=not found["without"])
    return {
        "files": ["triton"],
        "purpose": f"Triton {TRITON}'s cache of the headline, sm_{ARCHITECTURE}; asked again: {line}",
        "sources": kit.kernel_digest(root),
        "architecture": ARCHITECTURE,
        **{name: found[name] for name in ("launches", "python", "triton", "libtriton")},
    }


def check(own: Path, root: Path, stripped: Path, *, with_modules: bool) -> str:
    """Asks for every launch as a run on a GPU does, with the cache and the checkout in other places.

    Raises: RuntimeError if anything was not found: such a cache would serve nobody.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        for name in ("clipfast", "benchmarks"):
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
        cache.place(stripped, Path(folder) / "cache")
        found = precompile("ask", own, copy, Path(folder) / "cache")
    if found["missed"] or (with_modules and not found["modules"]):
        raise RuntimeError(f"Triton's keys are not those that a run asks for: {found}")
    return f"{found['line']}, and {found['modules']} modules in C"


def precompile(what: str, own: Path, root: Path, folder: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(KEYED)}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(folder)}
    return json.loads(run([own, "-m", "benchmarks.gpu.precompile", what], root, environment).splitlines()[-1])
