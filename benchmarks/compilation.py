"""Launches of Triton kernels compiled for an architecture that this machine need not have, and what they compile to."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError

from clipfast import tuning
from clipfast.bench import harness

RESOURCES = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
# columns of tensor memory (sm_100) that one block may use
TENSOR_MEMORY = 512


# ---------------------------------------------------------------------------------------------------------------------
# Launches kept instead of made


@dataclasses.dataclass(frozen=True)
class Launch:
    """One compilation that some call of a launcher needs."""

    module: str
    kernel: str
    architecture: int
    types: str  # of the pointers, each once: "fp16", "fp16/fp32"
    tile: str  # sizes known at compile time, warps, stages and limit of registers
    flags: tuple[str, ...]  # everything else known at compile time
    arguments: str  # what is known of sizes known at run time: 1, or a multiple of 16
    # Triton's own description, which it can compile in another process
    specialization: str = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        parts = (self.kernel, f"sm_{self.architecture}", self.types, self.tile, *self.flags, self.arguments)
        return " ".join(filter(None, parts))

    def covers(self) -> set[str]:
        """What the subset must hold: the tile in types as wide as these, and each other choice with any tile."""
        return {f"{self.tile} {self.types.replace('bf16', 'fp16')}", self.types, self.arguments, *self.flags}


class Driver:
    """What Triton asks of a machine, answered for an architecture that this one need not have."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        # one device for each architecture: Triton keeps what it knows of a target by device
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def collect(cases: Iterable[Callable[[], None]], architectures: Sequence[int]) -> list[Launch]:
    """Every different launch of the cases, none of them made or compiled.

    What this process has compiled before is not seen: Triton would go on to launch it.
    """
    seen: set[tuple[str, int, str]] = set()
    found: dict[Launch, None] = {}

    def keep(*, key: str, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        if (each := (fn.name, compile["device"], key)) not in seen:
            seen.add(each)
            launch = _described(fn.jit_function, json.loads(compile["specialization_data"]), compile["device"])
            found.setdefault(launch)
        return True  # handled: Triton neither compiles nor launches

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, keep
    try:
        for architecture, case in itertools.product(architectures, cases):
            triton.runtime.driver.set_active(Driver(architecture))
            with tuning.assume(architecture):
                case()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


def _described(jit: triton.JITFunction, data: dict[str, Any], architecture: int) -> Launch:
    known = {path[0]: value for path, value in zip(data["constant_keys"], data["constant_vals"], strict=True)}
    sizes, flags, arguments = [], [], []
    for i, (parameter, kind) in enumerate(zip(jit.params, data["signature"].values(), strict=True)):
        if parameter.is_constexpr:
            value, name = known[i], parameter.name.removeprefix("BLOCK_")
            if isinstance(value, int) and not isinstance(value, bool):
                sizes.append(f"{name}{value}")
            else:
                flags.append(f"{name}={value}")
        elif kind == "constexpr":
            arguments.append("1")
        elif kind.startswith("i"):
            divisible = [i] in data["attrs_keys"] and data["attrs_vals"][data["attrs_keys"].index([i])]
            arguments.append("16" if divisible else "-")
    options = data["options"]
    at_most = [f"r{options['maxnreg']}"] if options["maxnreg"] else []
    pointers = dict.fromkeys(kind[1:] for kind in data["signature"].values() if kind.startswith("*"))
    return Launch(
        module=jit.module,
        kernel=jit.fn.__name__,
        architecture=architecture,
        types="/".join(pointers),
        tile=" ".join([*sizes, f"w{options['num_warps']}", f"s{options['num_stages']}", *at_most]),
        flags=tuple(flags),
        arguments=",".join(arguments),
        specialization=json.dumps(data),
    )


def subset(launches: Iterable[Launch], limit: int | None = None) -> list[Launch]:
    """Few launches that cover what all of them do; at most `limit` for each kernel and architecture."""
    chosen = []
    for _, group in itertools.groupby(sorted(launches, key=_kernel_of), key=_kernel_of):
        rest = {launch: launch.covers() for launch in group}
        picked = []
        while any(rest.values()) and len(picked) != limit:
            picked.append(max(rest, key=lambda launch: len(rest[launch])))
            covered = rest.pop(picked[-1])
            rest = {launch: others - covered for launch, others in rest.items()}
        chosen += picked
    return chosen


def _kernel_of(launch: Launch) -> tuple[str, str, int]:
    return launch.module, launch.kernel, launch.architecture


# ---------------------------------------------------------------------------------------------------------------------
# One launch compiled


class Dot(NamedTuple):
    """A tl.dot: rows of the product, type of its operands, and how float32 operands are rounded."""

    rows: int
    dtype: str
    precision: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one launch compiled to; bytes, but tensor memory in columns."""

    launch: Launch
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    tensor_memory: int = 0
    dots: tuple[Dot, ...] = ()
    instructions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    ptxas: str = ""
    error: str = ""

    def faults(self) -> list[str]:
        """What is wrong, in words; empty if nothing is."""
        if self.error:
            return [self.error]
        architecture, limit = self.launch.architecture, tuning.SHARED_MEMORY[self.launch.architecture]
        found = [
            (self.stack or self.local, f"spills: {self.stack} bytes of stack, {self.local} of local memory"),
            (self.shared > limit, f"{self.shared} bytes of shared memory, {limit} available"),
            (self.tensor_memory > TENSOR_MEMORY, f"{self.tensor_memory} columns of tensor memory"),
        ]
        # float32 that is not to be rounded has no matrix instruction anywhere
        rounded = [dot for dot in self.dots if dot.dtype != "f32" or dot.precision == "tf32"]
        wide = any(dot.rows >= 64 and dot.dtype != "f32" for dot in rounded)
        if architecture == 90 and wide:
            found.append(("HGMMA" not in self.instructions, "no HGMMA for a product of 64 rows or more"))
        found.append((rounded and not self.instructions, "no matrix instruction"))
        return [text for wrong, text in found if wrong]

    def row(self) -> harness.Row:
        """As a line of the CSV, but for the columns of the whole run."""
        launch = self.launch
        numbers = {name: getattr(self, name) for name in (*RESOURCES, "shared", "tensor_memory")}
        return {
            **{name: getattr(launch, name) for name in ("kernel", "architecture", "types", "tile", "arguments")},
            **({} if self.error else numbers),
            "flags": " ".join(launch.flags),
            "shared_limit": tuning.SHARED_MEMORY[launch.architecture],
            "instructions": " ".join(f"{name}:{count}" for name, count in sorted(self.instructions.items())),
            "seconds": round(self.seconds, 3),
            "ptxas": self.ptxas,
            "faults": "; ".join(self.faults()),
        }


def compile_launch(launch: Launch) -> Compiled:
    """Compile one launch, in any process; what the compiler raises becomes `error`."""
    triton.runtime.driver.set_active(Driver(launch.architecture))
    start = time.perf_counter()
    try:
        jit = getattr(importlib.import_module(launch.module), launch.kernel)
        kernel = jit.preload(launch.specialization)
        seconds = time.perf_counter() - start
        dots = parse_dots(kernel.asm["ttir"])
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            resources = parse_resources(_output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin))
            sass = _output(knobs.nvidia.nvdisasm.path, "-c", cubin) if dots else ""
        return Compiled(
            launch,
            **resources,
            shared=kernel.metadata.shared,
            tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
            dots=dots,
            instructions=parse_matrix_instructions(sass),
            seconds=seconds,
            ptxas=_ptxas(launch.architecture),
        )
    except Exception as error:  # whatever it is, it is this launch's fault, and the others go on
        return Compiled(launch, seconds=time.perf_counter() - start, error=_reason(error))


def _reason(error: Exception) -> str:
    # Triton first says where, and last says what
    what = str(error).strip().splitlines()[-1] if isinstance(error, CompilationError) else ""
    return f"{harness.reason(error)} {what}".strip()


@functools.cache
def _ptxas(architecture: int) -> str:
    from triton import knobs

    # as triton.backends.nvidia.compiler chooses; before Triton 3.6 there is one for all
    blackwell = architecture >= 100 and getattr(knobs.nvidia, "ptxas_blackwell", None)
    return (blackwell or knobs.nvidia.ptxas).version


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_resources(text: str) -> dict[str, int]:
    """Registers, stack and local memory from `cuobjdump --dump-resource-usage`: of several functions, the most."""
    functions = re.findall(r"^\s*Function \S+:\s*\n(.*)$", text, flags=re.MULTILINE)
    if not functions:
        raise ValueError(f"cuobjdump names no function: {text[:80]!r}")
    used = [{name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", line)} for line in functions]
    # a name that is missing raises: a new spelling of LOCAL must not read as no spill
    return {ours: max(each[theirs] for each in used) for ours, theirs in RESOURCES.items()}


def parse_matrix_instructions(sass: str) -> dict[str, int]:
    """Counts by name: HMMA (a warp's), HGMMA (sm_90), UTCHMMA (sm_100), and those of other types."""
    return dict(Counter(re.findall(r"\*/\s+(?:@\S+\s+)?([A-Z]+MMA)\b", sass)))


def parse_dots(ttir: str) -> tuple[Dot, ...]:
    """The products in Triton's intermediate code, each different one once."""
    found = {}
    for line in re.findall(r"= tt\.dot .*", ttir):
        shape = re.search(r": tensor<([\dx]+)x([a-z]\w*)", line)
        if shape is None:
            raise ValueError(f"a product of an unknown form: {line[:120]!r}")
        precision = re.search(r"inputPrecision = (\w+)", line)
        rows = int(shape[1].split("x")[-2])
        found[Dot(rows, shape[2], precision[1] if precision else "ieee")] = None
    return tuple(found)


def compile_all(launches: Sequence[Launch], processes: int) -> Iterator[Compiled]:
    """In order. A compiler that dies takes only its own launch with it."""
    rest = list(launches)
    while rest:
        done = 0
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                for compiled in pool.map(compile_launch, rest):
                    done += 1
                    yield compiled
            except BrokenProcessPool:
                if processes == 1:  # then it is the first without an answer
                    yield Compiled(rest[done], error="the compiler died")
                    done += 1
                processes = 1
        rest = rest[done:]
