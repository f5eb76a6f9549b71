"""The arguments of `clipfast bench`: no import here is slow, so that every command may ask for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

MODELS = "ViT-B/32,ViT-L/14"
TOWERS = ("image", "text", "both", "train")
DTYPES = ("float32", "bfloat16", "float16")
MINUTES = 9.75


def add(parser: argparse.ArgumentParser) -> None:
    """All arguments, with their defaults."""
    several: dict[str, Any] = {"type": _several, "metavar": "A,B"}
    parser.description = (
        "Time whole CLIP models against every library that is installed, on the same weights and inputs."
    )
    parser.add_argument("--models", default=MODELS, **several, help="names from `clipfast models` (%(default)s)")
    parser.add_argument("--batch", default="1,8,32", type=_numbers, metavar="N,N", help="samples a call (%(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", **several, help=f"of {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--towers", default="image,text", **several, help=f"of {', '.join(TOWERS)} (%(default)s)")
    parser.add_argument("--peers", **several, help="who is compared (default: everybody installed); `--peers list`")
    parser.add_argument(
        "--captions",
        default="8-24",
        metavar="LENGTHS",
        help="tokens: uniform in a range, one length, or a file of captions, one a line (%(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each at the most (%(default)s)")
    parser.add_argument("--tail", type=int, default=100, help="the same at batch 1, for p95 and p99 (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="end within this time; 0: no limit (%(default)g)"
    )
    parser.add_argument("--threads", type=int, help="threads of an operator (default: PyTorch's own choice)")
    parser.add_argument("--out", type=Path, default=Path("clipfast-bench"), help="folder for results (%(default)s)")
    parser.add_argument("--name", help="name of the files (default: <kind of cpu or gpu>-<date>)")
    parser.add_argument("--no-plots", action="store_true", help="no pictures (they need matplotlib)")
    parser.add_argument("--no-start", action="store_true", help="do not measure import, first call and memory")
    parser.add_argument("--quick", action="store_true", help="small ceilings, 3 rounds: does it run?")
    parser.set_defaults(parser=parser)


def _several(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text!r}")
    return found
