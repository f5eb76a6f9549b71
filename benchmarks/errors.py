"""How far each Triton kernel is from the exact result, beside PyTorch's own distance, per operator and dtype.

    python -m benchmarks.errors [--csv PATH]

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
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import clipfast
from tests.op_cases import CASES, case_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Errors(NamedTuple):
    """Greatest and root-mean-square error over those of the exact result; of several cases the worst of each."""

    largest: float
    rms: float


def measure(name: str, dtype: torch.dtype, device: str) -> tuple[Errors, Errors, float]:
    """Ours, PyTorch's, and ours over the bound of tests/accuracy.py (at most 1), all of one case."""
    case = case_in(name, dtype).on(device)
    with torch.no_grad(), clipfast.backend("triton"):
        results = case.ours()
    ours, peer, exact = (
        torch.cat([x.detach().cpu().double().flatten() for x in each])
        for each in (results, case.peer(), case.on("cpu").exact())
    )
    size_max, size_rms = exact.abs().max().item(), exact.square().mean().sqrt().item()

    def errors(x):
        return Errors((x - exact).abs().max().item() / size_max, (x - exact).square().mean().sqrt().item() / size_rms)

    ours, peer = errors(ours), errors(peer)
    eps = torch.finfo(dtype).eps / 2  # at least half of one ulp's share of the size: a stricter bound than the tests'
    return ours, peer, max(a / (2 * b + eps) for a, b in zip(ours, peer, strict=True))


def rows(device: str) -> list[dict[str, object]]:
    worst: dict[tuple[str, torch.dtype], list[tuple[Errors, Errors, float]]] = defaultdict(list)
    for name, case in CASES.items():
        for dtype in DTYPES:
            worst[case.operator, dtype].append(measure(name, dtype, device))
    table = []
    for (operator, dtype), found in worst.items():
        ours = Errors(*(max(each) for each in zip(*(x[0] for x in found), strict=True)))
        peer = Errors(*(max(each) for each in zip(*(x[1] for x in found), strict=True)))
        table.append(
            {
                "operator": operator,
                "dtype": str(dtype).removeprefix("torch."),
                "cases": len(found),
                "max": ours.largest,
                "max of PyTorch": peer.largest,
                "RMS": ours.rms,
                "RMS of PyTorch": peer.rms,
                "of the bound": max(x[2] for x in found),
            }
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--csv", type=Path, help="write the table there too")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    table = rows(device)
    where = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    print(f"Relative errors on {where}, the worst of all cases; at most 1 of the bound passes")
    print(f"{'operator':<15}{'dtype':<10}{'cases':>6}" + "".join(f"{name:>16}" for name in [*table[0]][3:]))
    for row in table:
        figures = "".join(f"{row[name]:>16.2e}" for name in [*row][3:-1])
        print(f"{row['operator']:<15}{row['dtype']:<10}{row['cases']:>6}{figures}{row['of the bound']:>16.2f}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    return 0 if all(row["of the bound"] <= 1 for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
