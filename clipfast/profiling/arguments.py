"""The arguments of `clipfast profile`: no import here is slow."""

from __future__ import annotations

import argparse
from pathlib import Path

WHAT = ("image", "text", "train", "files")


def add(parser: argparse.ArgumentParser) -> None:
    """All arguments, with their defaults."""
    parser.description = (
        "Where the time goes: per operator and per layer, with the distance to what the machine allows."
    )
    parser.add_argument(
        "--model", default="ViT-B/32", help="a name from `clipfast models`; random weights (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="samples a pass (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--what", default="image", choices=WHAT, help="a tower, a train step, or files to embeddings")
    parser.add_argument("--captions", default="8-24", help="lengths in tokens, or a file of captions (%(default)s)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="for files: a folder (default: scikit-image's own)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    parser.add_argument(
        "--passes", type=int, default=5, help="timed passes, without and with the profiler (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of an operator (default: PyTorch's own choice)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a trace for chrome://tracing or ui.perfetto.dev")
    parser.add_argument("--out", type=Path, default=Path("clipfast-profile"), help="folder for results (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small ceilings: does it run?")
    parser.set_defaults(parser=parser)
