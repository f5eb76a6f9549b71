"""Everything that is measured of a CPU, on the one it finds: `make on-this-cpu`, 20 minutes at most on two cores.

    python -m benchmarks.on_this_cpu [--out benchmarks/results] [--quick]

It writes, each by a process of its own,

    <cpu>-<date>-linear.csv       matrix products in the best form that the CPU has (benchmarks/linear.py)
    <cpu>-<date>-linear-avx2.csv  the same, held to AVX2, where that is not the best
    <cpu>-<date>.csv, .json       ViT-B/32 beside onnxruntime, OpenVINO and openai-clip (`clipfast bench`)

where <cpu> tells kinds of one name apart, as in amd-epyc-25-17-avx512_bf16. `make readme` makes tables of them. Nothing
else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from clipfast.bench import environment
from clipfast.bench.house import ended_properly
from clipfast.files import check_folder

# what holds PyTorch, oneDNN and MKL to AVX2
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
MODELS = ("--models", "ViT-B/32", "--device", "cpu", "--no-start", "--no-plots")
CONTEST = ("--peers", "clipfast,clipfast prepacked,onnxruntime,OpenVINO,openai-clip", "--batch", "1,4,16,32")
# at most five rounds; at batch 1, where a turn is of several calls, four times as many. What takes long has fewer
CONTEST += ("--towers", "image,text", "--dtypes", "float32,bfloat16", "--rounds", "5", "--tail", "20")
# of the models; the products take about 8, held to AVX2 the longer part
MINUTES = "11"
QUICK = ("--peers", "clipfast", "--batch", "1", "--towers", "image", "--dtypes", "float32", "--quick")


class Part(NamedTuple):
    """A process.   variables: of its environment, beside ours."""

    what: str
    arguments: tuple[str, ...]
    variables: Mapping[str, str] = {}


def parts(out: Path, kind: str, date: str, quick: bool) -> list[Part]:
    """kind: of `environment.cpu_kind`."""
    stem = f"{kind}-{date}"

    def products(name: str, *more: str) -> tuple[str, ...]:
        path = environment.free_name(out, f"{stem}-{name}")
        return ("benchmarks.linear", "--csv", str(path), *more, *(("--quick",) if quick else ()))

    found = [Part("matrix products", products("linear"))]
    if kind.endswith(("avx512", "avx512_bf16", "amx")):
        held = products("linear-avx2", "--instructions", "avx2")
        found.append(Part("matrix products, held to AVX2", held, AVX2))
    contest = QUICK if quick else (*CONTEST, "--minutes", MINUTES)
    models = ("clipfast", "bench", *MODELS, *contest, "--out", str(out), "--name", stem)
    return [*found, Part("whole models", models)]


def run(todo: Sequence[Part]) -> int:
    """Returns the exit status: the first that was not 0. What fails does not keep the rest from running."""
    status, start = 0, time.monotonic()
    for number, part in enumerate(todo, 1):
        print(f"\n[{number}/{len(todo)}] {part.what}, after {(time.monotonic() - start) / 60:.0f} min", flush=True)
        done = _finished(part)
        if done:
            print(f"{part.what}: exit status {done}", file=sys.stderr)
        status = status or done
    print(f"\nall of it took {(time.monotonic() - start) / 60:.0f} min")
    return status


def _finished(part: Part) -> int:
    """Its exit status. Whatever ends us ends it first, and what it has measured by then is in its file."""
    process = subprocess.Popen([sys.executable, "-m", *part.arguments], env={**os.environ, **part.variables})
    try:
        return process.wait()
    except SystemExit:
        process.terminate()
        raise
    finally:
        # Ctrl-C it has got from the terminal, as we have
        process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_this_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for results (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute that says whether it runs, and nothing else")
    options = parser.parse_args(argv)
    try:
        check_folder(options.out)
    except OSError as error:
        parser.error(f"--out: {error}")
    facts = environment.environment()
    print(f"{facts['cpu']} ({facts['cpu_kind']}), {facts['threads']} threads, torch {facts['torch']}")
    try:
        with ended_properly():
            return run(parts(options.out, facts["cpu_kind"], facts["date"], options.quick))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
