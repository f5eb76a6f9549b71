"""Every kernel compiles for every architecture, without spills; and the report that says so can say otherwise."""

from __future__ import annotations

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.knobs", reason="the compile report needs Triton 3.4")

from benchmarks import compilation
from benchmarks.compilation import Compiled, Dot, Launch
from clipfast import tuning

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "clipfast" / "kernels"

# kernels with one fault each, and one without
TOYS = """
import torch
import triton
import triton.language as tl

from clipfast import tuning


@triton.jit
def _registers_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x - tl.sum(x))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n_, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for i in range(n):
        acc = tl.dot(tl.load(x_ptr + m * K + k[None, :] + i * K), tl.load(x_ptr + n_ * K + k[:, None] + i * K), acc)
    tl.store(y_ptr + m * N + n_, acc)


@triton.jit
def _wrong_kernel(x_ptr, N: tl.constexpr):
    tl.static_assert(N == 1, "N is not one")


def launch_fatal():
    import fatal

    if tuning.architecture(X.device) == 86:
        fatal._fatal_kernel[(1,)](X, N=1)


X, Y = torch.empty(9, dtype=torch.float16, device="meta"), torch.empty(9, device="meta")
CASES = {
    "fatal": launch_fatal,
    "wrong": lambda: _wrong_kernel[(1,)](X, N=2),
    "spills": lambda: _registers_kernel[(1,)](Y, Y, N=4096, num_warps=1, maxnreg=32),
    "roomy": lambda: _registers_kernel[(1,)](Y, Y, N=512, num_warps=4),
    # a quarter of a warp group has no HGMMA
    "warp": lambda: _dot_kernel[(1,)](X, Y, 9, M=64, N=16, K=16, num_warps=1),
    "group": lambda: _dot_kernel[(1,)](X, Y, 9, M=64, N=32, K=16, num_warps=4),
    "shared": lambda: _dot_kernel[(1,)](X, Y, 9, M=128, N=128, K=128, num_warps=8, num_stages=5),
}
"""
FATAL = """
import multiprocessing
import os

import triton
import triton.language as tl

if multiprocessing.parent_process() is not None:
    os._exit(9)


@triton.jit
def _fatal_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr, 0.0)
"""


def report(folder: Path, *command: str, timeout: int = 600) -> tuple[int, str, list[dict[str, str]]]:
    """Exit status, output and rows of the report in a process that compiles."""
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--csv", str(folder / "report.csv")],
        **{"cwd": ROOT, "env": environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
        **{"capture_output": True, "text": True, "timeout": timeout},
    )
    with (folder / "report.csv").open() as file:
        return done.returncode, done.stdout + done.stderr, list(csv.DictReader(file))


def defined_kernels() -> set[str]:
    """Names of the functions under triton.jit in the package that are launched: they end in _kernel."""
    return {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


# sm_86 and 89 have sm_80's instructions and sm_120's shared memory
ARCHITECTURES = tuning.ARCHITECTURES if os.environ.get("CLIPFAST_FULL") else (80, 90, 100, 120)


def test_every_kernel_on_every_architecture(tmp_path):
    """The launch of each that has the most in it; `python -m benchmarks.compile_report --full` has them all."""
    chosen = ",".join(map(str, ARCHITECTURES))
    command = ("-m", "benchmarks.compile_report", "--limit", "1", "--architectures", chosen)
    status, output, rows = report(tmp_path, *command)
    assert status == 0, output
    compiled: dict[str, set[int]] = {}
    for row in rows:
        compiled.setdefault(row["kernel"], set()).add(int(row["architecture"]))
    assert set(compiled) == defined_kernels(), "every kernel is launched by benchmarks/launches.py, by its launcher"
    newest_only = {"_linear_persistent_kernel": {90, 100}}
    expected = {name: newest_only.get(name, set(ARCHITECTURES)) for name in compiled}
    assert compiled == expected


def test_faults_are_found(tmp_path):
    (tmp_path / "toys.py").write_text(TOYS)
    (tmp_path / "fatal.py").write_text(FATAL)
    script = "import sys, toys; from benchmarks import compile_report; sys.exit(compile_report.main(cases=toys.CASES))"
    script = script.replace("main(", "main(sys.argv[1:], ")
    status, output, rows = report(tmp_path, "-c", script, "--architectures", "86,90", "--full")
    found = {(row["kernel"], row["tile"].split()[0], row["tile"].split()[1], row["architecture"]): row for row in rows}
    faults = {key: row["faults"] for key, row in found.items() if row["faults"]}
    assert status == 1
    assert len(rows) == 13 and len(faults) == 8, output
    assert faults["_fatal_kernel", "N1", "w4", "86"] == "the compiler died"
    for architecture in ("86", "90"):
        assert "N is not one" in faults["_wrong_kernel", "N2", "w4", architecture]
        assert faults["_registers_kernel", "N4096", "w1", architecture].startswith("spills: ")
    assert faults["_dot_kernel", "M64", "N16", "90"] == "no HGMMA for a product of 64 rows or more"
    assert "bytes of shared memory, 101376 available" in faults["_dot_kernel", "M128", "N128", "86"]
    assert "HGMMA" in found["_dot_kernel", "M64", "N32", "90"]["instructions"]
    assert "HMMA" in found["_dot_kernel", "M64", "N16", "86"]["instructions"]
    assert all(f"FAULT {kernel} sm_{architecture} " in output for kernel, *_, architecture in faults)


def launch(**changed) -> Launch:
    given = {"module": "m", "kernel": "_k_kernel", "architecture": 90, "types": "fp16", "tile": "M64 w4 s3"}
    return Launch(**given | {"flags": (), "arguments": "16", "specialization": "{}"} | changed)


@pytest.mark.parametrize(
    ("compiled", "fault"),
    [
        (Compiled(launch(), registers=255), ""),
        (Compiled(launch(), stack=8), "spills"),
        (Compiled(launch(), local=8), "spills"),
        (Compiled(launch(), shared=227 << 10), ""),
        (Compiled(launch(), shared=(227 << 10) + 1), "shared memory"),
        (Compiled(launch(architecture=120), shared=(99 << 10) + 1), "shared memory"),
        (Compiled(launch(architecture=100), tensor_memory=513), "tensor memory"),
        (Compiled(launch(), error="ptxas failed"), "ptxas failed"),
        (Compiled(launch(), dots=(Dot(64, "f16", "ieee"),), instructions={"HGMMA": 1}), ""),
        (Compiled(launch(), dots=(Dot(64, "bf16", "ieee"),), instructions={"HMMA": 1}), "HGMMA"),
        (Compiled(launch(), dots=(Dot(16, "f16", "ieee"),), instructions={"HMMA": 1}), ""),
        (Compiled(launch(architecture=80), dots=(Dot(64, "f16", "ieee"),), instructions={"HMMA": 1}), ""),
        (Compiled(launch(architecture=80), dots=(Dot(64, "f16", "ieee"),)), "no matrix instruction"),
        (Compiled(launch(), dots=(Dot(64, "f32", "ieee"),)), ""),
        (Compiled(launch(), dots=(Dot(64, "f32", "tf32"),)), "no matrix instruction"),
    ],
)
def test_what_is_a_fault(compiled, fault):
    found = "; ".join(compiled.faults())
    assert fault in found and bool(fault) == bool(found)


def test_the_most_of_several_functions():
    text = """Resource usage:
 Common:
  GLOBAL:0
 Function _a_kernel:
  REG:96 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function helper:
  REG:40 STACK:16 SHARED:1024 LOCAL:4 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert compilation.parse_resources(text) == {"registers": 96, "stack": 16, "local": 4}
    with pytest.raises(ValueError, match="no function"):
        compilation.parse_resources("Resource usage:\n Common:\n  GLOBAL:0\n")
    with pytest.raises(KeyError):
        compilation.parse_resources(text.replace("LOCAL", "SPILL"))


def test_matrix_instructions_are_counted_by_name():
    sass = """
        /*0a10*/                   HMMA.16816.F32 R4, R8, R16, R4 ;
        /*0a20*/              @!P0 HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;
        /*0a30*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR7], tmem[UR10], idesc[UR11], UP0 ;
        /*0a40*/                   HMMA.16816.F32.BF16 R4, R8, R16, R4 ;
        /*0a50*/                   FFMA R1, R2, R3, R4 ;
.section .text._MMA_kernel
"""
    assert compilation.parse_matrix_instructions(sass) == {"HMMA": 2, "HGMMA": 1, "UTCHMMA": 1}


def test_products_are_read_from_the_code():
    lines = [
        "%1 = tt.dot %a, %b, %c : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32> loc(#loc)",
        "%2 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x64xf32> * tensor<64x64xf32> -> tensor<16x64xf32>",
        "%3 = tt.dot %a, %b, %c : tensor<4x16x64xf16> * tensor<4x64x64xf16> -> tensor<4x16x64xf32>",
    ]
    expected = (Dot(64, "bf16", "ieee"), Dot(16, "f32", "tf32"), Dot(16, "f16", "ieee"))
    assert compilation.parse_dots("\n".join([*lines, lines[0]])) == expected
    with pytest.raises(ValueError, match="unknown form"):
        compilation.parse_dots("%4 = tt.dot something new")


def test_the_subset_covers_every_choice():
    launches = [
        launch(tile=tile, types=types, flags=(f"ACTIVATION={activation}",), arguments=arguments)
        for tile in ("M16", "M64")
        for types in ("fp16", "bf16", "fp32")
        for activation in ("none", "gelu")
        for arguments in ("1", "16")
    ]
    chosen = compilation.subset(launches)
    assert set.union(*(each.covers() for each in chosen)) == set.union(*(each.covers() for each in launches))
    assert len(chosen) < len(launches) / 3
    assert len(compilation.subset([*launches, launch(kernel="_other_kernel")], limit=2)) == 3
