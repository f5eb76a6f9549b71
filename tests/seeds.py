"""How often does chance break the rule of tests/accuracy.py?   python -m tests.seeds --first 1000 --seeds 200

Runs the comparisons of tests/test_ops.py and tests/test_loss.py with other random numbers, and counts the draws that
fail: of what rounds as PyTorch does, none in a million should. The table gives operator, dtype and backend, and the
status is 1 if a draw failed. Triton's interpreter is slow: name its backend to have it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from clipfast import tuning

from . import backends, op_cases, test_loss, test_ops

KINDS = ("forward", "gradients", "loss")
BACKENDS = ("cpu", "onednn", "torch", "triton")


class Check(NamedTuple):
    """One comparison, whose numbers follow from the seed."""

    kind: str  # "forward", "gradients" or "loss"
    name: str
    dtype: torch.dtype
    backend: str

    @property
    def group(self) -> tuple[str, str, str, str]:
        operator = "loss" if self.kind == "loss" else op_cases.CASES[self.name].operator
        return self.kind, operator, str(self.dtype)[6:], self.backend

    def run(self, seed: int) -> None:
        """Raises: AssertionError if the draw breaks the rule; pytest's Skipped if this CPU cannot run it."""
        if self.kind == "loss":
            torch.manual_seed(seed)
            n, width, scale, noise = LOSSES[self.name]
            with mock.patch.object(tuning, "loss_side", return_value=7):
                test_loss.test_against_float64(n, width, scale, noise, self.dtype, None)
            return
        case = op_cases.draw(self.name, op_cases.RECIPES[self.name], seed)
        place = backends.device_of(self.backend)
        with mock.patch.dict(op_cases.CASES, {self.name: case}):
            if self.kind == "forward":
                test_ops.test_forward(self.name, self.dtype, self.backend, place, None)
            else:
                test_ops.check_gradients(self.name, self.dtype, self.backend, place, seed)


LOSSES = {
    f"{size} {kind}": (*size, noise)
    for size, (kind, noise) in itertools.product(test_loss.SIZES, test_loss.NOISES.items())
}


def checks(kinds: list[str], backends: list[str]) -> Iterator[Check]:
    for kind, cases in (("forward", test_ops.FORWARD), ("gradients", test_ops.GRADIENTS)):
        for name, dtype, backend in (case.values for case in cases if kind in kinds):
            if backend in backends:
                yield Check(kind, name, dtype, backend)
    if "loss" in kinds and "torch" in backends:
        for name in LOSSES:
            for dtype in test_loss.DTYPES:
                yield Check("loss", name, dtype, "torch")


def count(check: Check, seeds: range, until: float) -> tuple[int, list[str]]:
    """How many draws were compared before the time `until`, and what was said of those that failed."""
    torch.set_num_threads(1)
    done, failed = 0, []
    for seed in seeds:
        if time.time() > until:
            break
        try:
            check.run(seed)
        except pytest.skip.Exception:
            break
        except AssertionError as error:
            failed.append(f"seed {seed}: {str(error).splitlines()[0]}")
        done += 1
    return done, failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.seeds", description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed (%(default)s, which the tests have)")
    parser.add_argument("--seeds", type=int, default=200, help="how many (%(default)s)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS[:3], choices=BACKENDS, help='and "triton"')
    parser.add_argument("--minutes", type=float, default=1e6, help="what is not begun by then is left out")
    args = parser.parse_args()

    seeds, until = range(args.first, args.first + args.seeds), time.time() + 60 * args.minutes
    several = sorted(checks(args.kinds, args.backends), key=lambda check: check.group)
    print(f"{'kind':10} {'operator':15} {'dtype':9} {'backend':8} {'draws':>7} {'seeds':>6} {'failed':>7}", flush=True)
    draws, bad = 0, 0
    # a process for each core, since small operators keep one busy at most
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        results = zip(several, pool.map(count, several, [seeds] * len(several), [until] * len(several)), strict=True)
        for group, checked in itertools.groupby(results, key=lambda result: result[0].group):
            done, failed = zip(*(result for _, result in checked), strict=True)
            if not any(done):
                continue
            said = [*itertools.chain(*failed)]
            print("{:10} {:15} {:9} {:8} {:7} {:6} {:7}".format(*group, sum(done), min(done), len(said)), flush=True)
            print(*(f"  {line}\n" for line in said), sep="", end="", flush=True)
            draws, bad = draws + sum(done), bad + len(said)
    print(f"{bad} of {draws} failed")
    return int(bad > 0 or draws == 0)


if __name__ == "__main__":
    sys.exit(main())
