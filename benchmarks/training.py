"""Memory of whole train steps: forward, contrastive loss, backward, AdamW; each contestant in a process of its own.

    python -m benchmarks.training [--model ViT-B/32] [--batch 32] [--dtypes float32,bfloat16] [--captions 8-24]
        [--steps 3] [--csv PATH]

Peak is the most that the process held in all, with weights, gradients and AdamW's state; what is in it before a model
is built is given apart. Half precision is autocast over float32 weights. `clipfast bench --towers train` compares the
times, interleaved in one process; those here are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import environment, output, peers, start, training, workload
from clipfast.bench.harness import Row, reason, significant

CONTESTANTS = ("clipfast", "openai-clip", "open_clip")
COLUMNS = (
    *(*environment.ENVIRONMENT, "model", "dtype", "batch", "captions", "contestant", "status"),
    *("steps", "median_s", "base_mb", "peak_mb", "peak_vs_openai", "note"),
)


def child(contestant: str, model: str, dtype: str, batch: int, captions: str, steps: int) -> Row:
    """In a process of its own: a few steps, and the most memory they took."""
    base = start.memory("VmRSS")
    architecture = ARCHITECTURES[model]
    spec = peers.Spec(workload.random_weights(architecture), architecture, getattr(torch, dtype))
    data = workload.inputs(architecture, batch, workload.Captions.parse(captions))
    found, missing = training.trainers(spec, [contestant])
    if contestant in missing:
        return {"status": "missing", "note": missing[contestant]}
    spec.weights.clear()
    start.forget_peak()
    pairs, seconds = peers.Batch(data["image"], data["text"]), []
    for _ in range(steps):
        begin = time.perf_counter()
        found[contestant].step(pairs)
        seconds.append(time.perf_counter() - begin)
    sizes = {"base_mb": significant(base / 1e6), "peak_mb": significant(start.memory("VmHWM") / 1e6)}
    return {"status": "ok", "steps": steps, "median_s": significant(statistics.median(seconds)), **sizes}


def measure(contestant: str, options: argparse.Namespace, dtype: str) -> Row:
    given = [contestant, options.model, dtype, str(options.batch), options.captions, str(options.steps)]
    command = [sys.executable, "-m", "benchmarks.training", "--child", *given]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return {"status": "failed", "note": (error.stderr.strip().splitlines() or [str(error)])[-1][:160]}
    except (OSError, ValueError, IndexError) as error:
        return {"status": "failed", "note": reason(error)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="ViT-B/32", choices=ARCHITECTURES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--captions", default="8-24")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.child:
        contestant, model, dtype, batch, captions, steps = options.child
        print(json.dumps(child(contestant, model, dtype, int(batch), captions, int(steps))))
        return 0
    facts = environment.environment()
    rows: list[Row] = []
    for dtype in options.dtypes.split(","):
        found = {name: measure(name, options, dtype) for name in CONTESTANTS}
        theirs = found["openai-clip"].get("peak_mb")
        for name, row in found.items():
            if theirs and "peak_mb" in row:
                row["peak_vs_openai"] = significant(row["peak_mb"] / theirs)
            rows.append({"model": options.model, "dtype": dtype, "batch": options.batch, "contestant": name, **row})
    header = ("contestant", "dtype", "median s", "MB before", "peak MB", "of openai's")
    lines = [
        (
            row["contestant"] + ("" if row["status"] == "ok" else f" ({row['status']})"),
            row["dtype"],
            output.cell(row, "median_s", ".3f"),
            *(output.cell(row, name, ".0f") for name in ("base_mb", "peak_mb")),
            output.cell(row, "peak_vs_openai", ".2f"),
        )
        for row in rows
    ]
    title = f"{options.model} train step, batch {options.batch}, captions of {options.captions} tokens"
    output.print_table(title, header, lines, names=2)
    output.write_csv(options.csv, COLUMNS, (facts | {"captions": options.captions} | row for row in rows))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
