"""How far each Triton kernel is from the exact result, beside PyTorch's own distance, per operator and dtype.

    python -m benchmarks.errors [--operators linear,mlp] [--csv PATH]

Without a GPU the kernels run under Triton's interpreter: NumPy in the kernel's own order of blocks and its dtypes, so
the rounding of loads, stores and block sums is the kernel's; the order inside one block, and a GPU's approximate
exponential, are not. The cases are those of the tests; exact is float64 on the already rounded arguments.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch

import clipfast
from clipfast.bench.accuracy import rms
from tests.accuracy import bounds
from tests.op_cases import CASES, Case, case_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Errors(NamedTuple):
    """Greatest and root-mean-square error over those of the exact result; of several results the worst of each."""

    largest: float
    rms: float


# their backward has kernels of its own
WITH_GRADIENTS = ("layer_norm", "linear", "mlp", "attention", "patch_embed", "project")
Outcome = list[torch.Tensor]


def forward(case: Case, run: Callable[[Case], tuple[torch.Tensor, ...]]) -> Outcome:
    with torch.no_grad():
        return [*run(case)]


def gradients(case: Case, run: Callable[[Case], tuple[torch.Tensor, ...]]) -> Outcome:
    """Of every floating argument but images and their mean and deviation, for a random upstream gradient."""
    case = case.map(lambda x: x.clone().requires_grad_())
    others = {id(case.options.get(name)) for name in ("mean", "std")}
    if case.operator == "patch_embed":
        case.arguments[0].requires_grad_(False)
    leaves = [x for x in case.tensors() if x.requires_grad and x.numel() and id(x) not in others]
    outputs = run(case)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    return [*torch.autograd.grad(outputs, leaves, upstream)]


def measure(name: str, dtype: torch.dtype, device: str, of: Callable[..., Outcome]) -> tuple[Errors, Errors, float]:
    """Ours, PyTorch's, and ours over the bound of tests/accuracy.py (at most 1), all of one case."""
    case = case_in(name, dtype).on(device)
    with clipfast.backend("triton"):
        ours = of(case, Case.ours)
    found = []
    exacts = of(case.on("cpu").map(lambda x: x.double()), Case.exact)
    for tensors in zip(ours, of(case, Case.peer), exacts, strict=True):
        x, peer, exact = (each.detach().cpu().double() for each in tensors)
        allowed = bounds(peer - exact, exact, dtype)
        error = (x - exact).abs().max().item(), rms(x - exact)
        share = max(one / most for one, most in zip(error, allowed, strict=True))
        found.append((_errors(x, exact), _errors(peer, exact), share))
    return _worst(found)


def _errors(x: torch.Tensor, exact: torch.Tensor) -> Errors:
    error = x - exact
    return Errors(error.abs().max().item() / exact.abs().max().item(), rms(error) / rms(exact))


def _worst(found: list[tuple[Errors, Errors, float]]) -> tuple[Errors, Errors, float]:
    ours, peer = (Errors(*map(max, zip(*(x[i] for x in found), strict=True))) for i in (0, 1))
    return ours, peer, max(x[2] for x in found)


def rows(device: str, operators: Collection[str]) -> list[dict[str, object]]:
    worst: dict[tuple[str, torch.dtype], list[tuple[Errors, Errors, float]]] = defaultdict(list)
    for name, case in CASES.items():
        if case.operator not in operators:
            continue
        for dtype in DTYPES:
            worst[case.operator, dtype].append(measure(name, dtype, device, forward))
            if case.operator in WITH_GRADIENTS:
                worst[f"{case.operator} gradient", dtype].append(measure(name, dtype, device, gradients))
    table = []
    for (operator, dtype), found in sorted(worst.items(), key=str):
        ours, peer, share = _worst(found)
        table.append(
            {
                "operator": operator,
                "dtype": str(dtype).removeprefix("torch."),
                "cases": len(found),
                "max": ours.largest,
                "max of PyTorch": peer.largest,
                "RMS": ours.rms,
                "RMS of PyTorch": peer.rms,
                "of the bound": share,
            }
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = sorted({case.operator for case in CASES.values()})
    parser.add_argument("--operators", default=",".join(names), help="comma-separated (default: all)")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    options = parser.parse_args(arguments)
    if unknown := set(options.operators.split(",")) - set(names):
        parser.error(f"--operators: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # before Triton is imported, which the first kernel does; clipfast was, and so did not correct the interpreter
        os.environ.setdefault("TRITON_INTERPRET", "1")
        from clipfast.kernels import interpreter

        interpreter.install()
    torch.manual_seed(0)
    table = rows(device, options.operators.split(","))
    where = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    print(f"Relative errors on {where}, the worst of all cases; at most 1 of the bound passes")
    print(f"{'operator':<22}{'dtype':<10}{'cases':>6}" + "".join(f"{name:>16}" for name in [*table[0]][3:]))
    for row in table:
        figures = "".join(f"{row[name]:>16.2e}" for name in [*row][3:-1])
        print(f"{row['operator']:<22}{row['dtype']:<10}{row['cases']:>6}{figures}{row['of the bound']:>16.2f}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    return 0 if all(row["of the bound"] <= 1 for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
