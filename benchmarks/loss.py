"""Memory and time of the contrastive loss with its gradients: clipfast's, and open_clip's formula where it fits.

    python -m benchmarks.loss [--batches 1024,4096,32768] [--width 512] [--dtype float32] [--device cpu] [--rounds 3]
        [--dense-gb 4] [--threads N] [--csv PATH]

Every contestant at every batch runs in a process of its own, so that none pays for, or lives in, another's memory.
Extra memory is the process's peak (on a GPU that of PyTorch's allocator) less what it held before the call, where the
features and room for their gradients are held already. The dense loss is left out where it would take more than
--dense-gb. Up to --checked pairs the gradients are compared with float64 first.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import reference
from clipfast.bench import environment, harness, output
from clipfast.bench.accuracy import relative_rms
from clipfast.loss import contrastive_loss
from clipfast.timing import interleaved

OURS, DENSE = "clipfast", "dense"
# logits, log-probabilities and their gradients, for the images and for the texts
DENSE_TENSORS = 6
# of the gradients: far above rounding, far below a wrong tile
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
COLUMNS = (
    *(
        *environment.ENVIRONMENT,
        "device",
        "dtype",
        "batch",
        "width",
        "contestant",
        "status",
        "extra_mb",
        *harness.TIMES,
    ),
    *("gflops", "rel_rms", "note", "seconds"),
)


def dense_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As open_clip computes it."""
    labels = torch.arange(len(image), device=image.device)
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


LOSSES: dict[str, Callable[..., Tensor]] = {OURS: contrastive_loss, DENSE: dense_loss}


def features(batch: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Pairs at a cosine of about a quarter, and CLIP's scale of 100 after training."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(batch, width, generator=generator) for _ in range(2))
    towers = [F.normalize(x, dim=1).to(device, dtype) for x in (image, image / 4 + noise)]
    return [x.requires_grad_() for x in (*towers, torch.tensor(100.0, device=device))]


def step(loss: Callable[..., Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*leaves), leaves)


def extra_memory(function: Callable[[], object], leaves: Sequence[Tensor]) -> int | None:
    """Bytes at the peak of a call, beyond the leaves and their gradients; None where the system does not tell."""
    room = [torch.ones_like(x) for x in leaves]
    if leaves[0].is_cuda:
        held = torch.cuda.memory_allocated()
        del room
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - held
    try:
        held = _resident("VmRSS")
        del room
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        function()
        return max(0, _resident("VmHWM") - held)
    except OSError:
        return None


def _resident(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) << 10


def measure(contestant: str, batch: int, options: argparse.Namespace) -> harness.Row:
    """In this process, which should have done nothing else."""
    dtype = harness.DTYPES[options.dtype]
    # threads, and what the products keep, are there before the memory counts
    step(LOSSES[contestant], features(64, options.width, dtype, options.device))
    leaves = features(batch, options.width, dtype, options.device)
    call = functools.partial(step, LOSSES[contestant], leaves)
    extra = extra_memory(call, leaves)
    row: harness.Row = {"status": "ok"}
    if extra is not None:
        row["extra_mb"] = harness.significant(extra / 1e6)
    if batch <= options.checked:
        exact = step(reference.contrastive_loss, [x.detach().double().requires_grad_() for x in leaves])
        row["rel_rms"] = harness.significant(max(map(relative_rms, call(), exact)))
        if not row["rel_rms"] <= BOUNDS[options.dtype]:
            return row | {"status": "WRONG", "note": f"rel_rms > {BOUNDS[options.dtype]:g}"}
    row |= harness.times(interleaved({contestant: call}, rounds=options.rounds, warmup=0)[contestant])
    # forward, and backward with every product computed again
    row["gflops"] = harness.significant(8 * batch**2 * options.width / row["median_s"] / 1e9)
    return row


def in_its_process(contestant: str, batch: int, options: argparse.Namespace) -> harness.Row:
    if contestant == DENSE:
        size = DENSE_TENSORS * harness.DTYPES[options.dtype].itemsize * batch**2 / 1e9
        if size > options.dense_gb:
            return {"status": "skipped", "note": f"about {size:.2g} GB"}
    command = [sys.executable, "-m", "benchmarks.loss", "--one", contestant, "--batches", str(batch)]
    for name in ("width", "dtype", "device", "rounds", "checked", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"status": "failed", "note": harness.reason(RuntimeError(last))}
    return json.loads(done.stdout.splitlines()[-1])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", default="1024,4096,32768")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=BOUNDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dense-gb", type=float, default=4)
    parser.add_argument("--checked", type=int, default=1024, help="pairs up to which float64 is computed too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--one", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.batches = [int(text) for text in options.batches.split(",")]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options.batches[0], options)))
        return 0
    facts = environment.environment()
    environment.warn_if_busy(facts)
    rows, progress = [], output.Progress(len(options.batches) * len(LOSSES))
    for batch in options.batches:
        for contestant in LOSSES:
            progress.say(f"{contestant} {batch}")
            sizes = {"device": options.device, "dtype": options.dtype, "batch": batch, "width": options.width}
            rows.append(facts | sizes | {"contestant": contestant} | in_its_process(contestant, batch, options))
            output.write_csv(options.csv, COLUMNS, rows)
            progress.tick(1)
    progress.clear()
    _print(rows, options)
    return int(any(row["status"] not in ("ok", "skipped") for row in rows))


def _print(rows: Sequence[harness.Row], options: argparse.Namespace) -> None:
    lines = [
        [
            *(row["contestant"], str(row["batch"]), row["status"], output.cell(row, "extra_mb", ".1f")),
            *(output.cell(row, "median_s", ".3f"), output.cell(row, "gflops", ".1f")),
            *(output.cell(row, "rel_rms", ".1e"), row.get("note", "")),
        ]
        for row in rows
    ]
    header = ("loss", "pairs", "status", "extra MB", "s", "GFLOP/s", "rel RMS", "note")
    notes = ["extra MB: at the peak of forward and backward, beyond features and gradients; GFLOP/s of 8 N^2 E"]
    title = f"contrastive loss and gradients, E = {options.width}, {options.dtype}, {options.threads} threads"
    output.print_table(title, header, lines, notes)


if __name__ == "__main__":
    sys.exit(main())
