"""Arguments of `clipfast train` and `clipfast eval`; what they do is in `command.py`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from clipfast.training.samples import FORMATS

__all__ = ["add_eval", "add_train"]

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")


def add_train(parser: argparse.ArgumentParser, positive: Callable, template: Callable) -> None:
    """positive, template: the command line's own types."""
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", metavar="NAME", help="architecture: a name from `clipfast models`, or a .json file")
    what.add_argument("--init", metavar="MODEL", help="weights to start from, as `load` takes them (default: random)")
    what.add_argument("--activation", choices=("quick_gelu", "gelu"), help="for weights that do not say")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="folder, table (.csv .tsv .parquet), shards"
    )
    _add_format(data)
    _add_templates(data, template, "captions of images in class folders")
    data.add_argument(
        "--crop-scale",
        nargs=2,
        type=_share,
        default=(0.9, 1.0),
        metavar=("LEAST", "MOST"),
        help="area of the random crop (0.9 1.0)",
    )

    _add_optimisation(parser.add_argument_group("optimisation"), positive)

    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="checkpoints, metrics, the final model")
    run.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: go on with the run in --out; never: fail if there is one (%(default)s)",
    )
    run.add_argument("--save-every", type=positive, default=500, metavar="STEPS", help="%(default)s")
    run.add_argument("--keep", type=positive, default=2, metavar="N", help="checkpoints that stay (%(default)s)")
    _add_workers(run)

    checks = parser.add_argument_group("evaluation")
    _add_evaluations(checks)
    checks.add_argument("--eval-every", type=positive, default=1, metavar="EPOCHS", help="%(default)s")


def add_eval(parser: argparse.ArgumentParser, template: Callable) -> None:
    """Without the model, which is the command line's own group."""
    group = parser.add_argument_group("data")
    _add_evaluations(group)
    _add_templates(group, template, "prompts of a class, averaged")
    _add_format(group)
    _add_workers(group)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the JSON there too")


def _add_optimisation(how, positive: Callable) -> None:
    length = how.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, default=32, metavar="N", help="times through the data (%(default)s)")
    length.add_argument("--steps", type=positive, metavar="N", help="instead of --epochs")
    how.add_argument(
        "--batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="pairs that the loss compares, of all processes together (%(default)s)",
    )
    how.add_argument(
        "--micro-batch",
        type=positive,
        metavar="N",
        help="pairs per process in memory at once; the loss stays that of the batch",
    )
    how.add_argument("--lr", type=_more_than_zero, default=5e-4, help="greatest learning rate (%(default)s)")
    how.add_argument("--warmup", type=_whole, metavar="STEPS", help="default: a tenth of all steps, at most 10000")
    how.add_argument("--weight-decay", type=_not_negative, default=0.2, help="%(default)s")
    how.add_argument("--beta1", type=_fraction, default=0.9, help="%(default)s")
    how.add_argument("--beta2", type=_fraction, help="default: 0.98 for a ViT, 0.999 for a ResNet")
    how.add_argument("--eps", type=_more_than_zero, help="default: 1e-6 for a ViT, 1e-8 for a ResNet")
    how.add_argument("--grad-clip", type=_more_than_zero, metavar="NORM", help="greatest norm of the gradient")
    how.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the products (%(default)s)")
    how.add_argument("--grad-checkpointing", action="store_true", help="compute activations twice, keep few")
    how.add_argument("--seed", type=_whole, default=0, help="%(default)s")
    how.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")


def _add_format(group) -> None:
    group.add_argument("--format", choices=FORMATS, default="auto", help="of the data (default: see what is there)")
    group.add_argument("--image-column", metavar="NAME", help="of a table")
    group.add_argument("--caption-column", metavar="NAME", help="of a table, or field of a shard's .json")


def _add_templates(group, template: Callable, use: str) -> None:
    group.add_argument(
        "--template",
        action="append",
        type=template,
        metavar="TEXT",
        help=f'{use}, {{}} for the class; may be repeated (default: "a photo of a {{}}.")',
    )
    group.add_argument("--templates-file", type=Path, metavar="FILE", help="templates, one a line")


def _add_evaluations(group) -> None:
    group.add_argument(
        "--zero-shot", nargs="+", metavar="PATH", help="accuracy on class folders, or on a table with classes"
    )
    group.add_argument("--classes", type=Path, metavar="FILE", help="classes, one a line, or folder<TAB>class")
    group.add_argument("--retrieval", nargs="+", metavar="PATH", help="recall at 1, 5 and 10 on images with captions")


def _add_workers(group) -> None:
    workers = min(4, os.cpu_count() or 1)
    group.add_argument("--workers", type=_whole, default=workers, metavar="N", help="processes that read (%(default)s)")


def _number(kind: type, allowed: Callable[[float], bool], what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


_whole = _number(int, lambda value: value >= 0, "a whole number of at least 0")
_more_than_zero = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
_not_negative = _number(float, lambda value: 0 <= value < float("inf"), "a number of at least 0")
_fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
_share = _number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")
