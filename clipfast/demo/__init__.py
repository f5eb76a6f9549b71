"""`clipfast demo`: train a small CLIP on real images, use it, check it and time it; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.checkpoints import load, save
from clipfast.commands import CommandError, pick_device
from clipfast.demo import digits as d
from clipfast.demo.photographs import OURS, Comparison, compare
from clipfast.files import check_file, check_folder, write_bytes
from clipfast.model import CLIP

__all__ = ["run"]

STEPS, ACCURACY = 700, 0.95
QUICK_STEPS, QUICK_ACCURACY = 150, 0.75
# the bound for whole models in float32
LARGEST_GAP = 1e-6
MODEL, PICTURE, FIGURES = "digits.pt", "demo.png", "results.json"
NEEDED = {"sklearn": "scikit-learn", "skimage": "scikit-image", "matplotlib": "matplotlib"}


def run(
    out: Path,
    *,
    steps: int | None = None,
    quick: bool = False,
    device: str | None = None,
    written: list[Path] | None = None,
) -> int:
    """Every step of the demo, told on stdout; the model, a picture and the figures end up in `out`.

    steps:   of training; 1000, or 150 with quick.
    quick:   a lower bar for accuracy (75 % instead of 95 %) and no timing.
    written: each file is added once it is there.
    Returns: 0, or 1 if accuracy is below the bar or a result strays from the float64 reference.
    Raises:  CommandError if a library is missing, OSError if `out` cannot be written to.
    """
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"the demo needs {', '.join(missing)}: pip install 'clipfast[demo]'")
    check_folder(out)
    for name in (MODEL, PICTURE, FIGURES):
        check_file(out / name)
    written = [] if written is None else written
    steps, bar = steps or (QUICK_STEPS if quick else STEPS), QUICK_ACCURACY if quick else ACCURACY
    on = pick_device(device)

    digits = d.load_digits()
    started = time.perf_counter()
    model, losses = _train(digits, steps, on)
    seconds = time.perf_counter() - started
    save(model, out / MODEL)
    written.append(out / MODEL)
    print(f"   {seconds:.0f} s, loss {losses[-1]:.3f}; saved in openai/CLIP's layout as {out / MODEL}")

    model, preprocess = load(out / MODEL, on, dtype="float32")
    pixels = preprocess(digits.test).to(on)
    reading = _read(digits, model, pixels, on)
    result = _check(reading, model, pixels)
    failures = _failures(reading, result, steps, bar, quick)

    def write(comparison: Comparison | None) -> None:
        figures = _figures(losses, seconds, reading, result, comparison)
        _write(out, digits, reading, losses, comparison, figures, written)

    # something to look at while the rest is timed
    write(None)
    if not quick:
        write(_compare(on))
    for failure in failures:
        print(f"clipfast: demo failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _train(digits: d.Digits, steps: int, device: torch.device) -> tuple[CLIP, list[float]]:
    n_train, n_test = len(digits.train), len(digits.test)
    print(f"1. Train a small CLIP on {n_train:,} handwritten digits and {len(d.TRAINED)} captions for each ({device})")
    print(f"   {n_test} more digits are kept for the test; {steps} steps of {10 * d.PER_CLASS} pairs", flush=True)
    return d.train(digits, steps, device)


def _read(digits: d.Digits, model: CLIP, pixels: Tensor, device: torch.device) -> d.Reading:
    reading = d.read(digits, model.encode_image, lambda tokens: model.encode_text(tokens.to(device)), pixels)
    right, total = int(reading.confusion.trace()), len(digits.test)
    print("2. Load it and read the test digits, with captions that training never used")
    print(f"   {right} of {total} right: {100 * reading.accuracy:.1f} %")
    print(f"   images found by text; of the first {d.NEAREST} so many are right:")
    for query, precision in reading.precision.items():
        print(f"     {100 * precision:4.0f} %  {query}")
    return reading


def _check(reading: d.Reading, model: CLIP, pixels: Tensor) -> d.Check:
    result = d.check(reading, {name: tensor.cpu() for name, tensor in model.state_dict().items()}, pixels.cpu())
    total = len(reading.predictions)
    print("3. Compare with plain PyTorch in float64")
    ties = f", {result.ties} more are ties (two digits within {d.TIE:g} in cosine)" if result.ties else ""
    print(f"   same answer for {result.same} of {total}{ties}")
    print(f"   largest 1 - cos: images {result.image_gap:.1e}, texts {result.text_gap:.1e}")
    return result


def _failures(reading: d.Reading, result: d.Check, steps: int, bar: float, quick: bool) -> list[str]:
    failures = []
    if not reading.accuracy >= bar:
        usual = QUICK_STEPS if quick else STEPS
        hint = f"; after {steps} steps, where {usual} are usual" if steps < usual else ""
        failures.append(f"{100 * reading.accuracy:.1f} % of the test digits are right, below {100 * bar:.0f} %{hint}")
    if result.different:
        failures.append(f"{result.different} answers differ from the float64 reference")
    if not (result.image_gap <= LARGEST_GAP and result.text_gap <= LARGEST_GAP):  # so that NaN fails
        gaps = f"images {result.image_gap:.1e}, texts {result.text_gap:.1e}"
        failures.append(f"1 - cos to the float64 reference is above {LARGEST_GAP:g}: {gaps}")
    return failures


def _compare(device: torch.device) -> Comparison:
    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"4. Time ViT-B/32 on {where}: every library on the same photographs, captions and weights, taking turns")
    print("   The weights are random, as nothing is downloaded: this shows speed and numerics only.", flush=True)
    comparison = compare(device, lambda so_far, dtype: print(_table(so_far, dtype), flush=True))
    for name, reason in (comparison.missing | comparison.left_out).items():
        print(f"   {name}: {reason}")
    print('   "x": how many times as fast clipfast is. 1 - cos: the largest, to float64 on the float32 weights.')
    return comparison


def _table(comparison: Comparison, dtype: str) -> str:
    rows = [row for row in comparison.rows if row.dtype == dtype]
    ours = next(row for row in rows if row.name == OURS)
    head = f"{dtype}, medians of {comparison.rounds[dtype]}"
    lines = [
        f"   {head:<27}{'images/s':>9}{'x':>6}{'texts/s':>10}{'x':>6}{'1 - cos images':>17}{'texts':>9}",
    ]
    for row in rows:
        ratios = (ours.images_per_second / row.images_per_second, ours.texts_per_second / row.texts_per_second)
        by_image, by_text = ("" if row is ours else f"{ratio:.2f}" for ratio in ratios)
        rates = f"{row.images_per_second:>9.1f}{by_image:>6}{row.texts_per_second:>10.1f}{by_text:>6}"
        lines.append(f"   {row.name:<27}{rates}{row.image_gap:>17.1e}{row.text_gap:>9.1e}")
    return "\n".join(lines)


def _figures(
    losses: list[float], seconds: float, reading: d.Reading, result: d.Check, comparison: Comparison | None
) -> dict[str, Any]:
    """Everything that was measured, for the JSON file."""
    return {
        "training": {"steps": len(losses), "seconds": round(seconds, 2), "loss": [round(loss, 5) for loss in losses]},
        "test": {
            "accuracy": reading.accuracy,
            "right": int(reading.confusion.trace()),
            "images": len(reading.predictions),
            "confusion": reading.confusion.tolist(),
            "precision_at_8": reading.precision,
        },
        "float64": asdict(result),
        "throughput": None if comparison is None else asdict(comparison),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _write(
    out: Path,
    digits: d.Digits,
    reading: d.Reading,
    losses: list[float],
    comparison: Comparison | None,
    figures: dict[str, Any],
    written: list[Path],
) -> None:
    from clipfast.demo import picture

    write_bytes(out / FIGURES, json.dumps(figures, indent=2).encode())
    learned = f"{len(digits.train):,} real digits to learn from, {len(digits.test)} to test on"
    told = f"{100 * reading.accuracy:.1f} % right, named by captions that training never used"
    picture.draw(out / PICTURE, digits, reading, losses, comparison, f"{learned}: {told}")
    written += [path for path in (out / FIGURES, out / PICTURE) if path not in written]
    print(f"Picture: {out / PICTURE}\nFigures: {out / FIGURES}", flush=True)
