"""Memory and time of the contrastive loss, forward and backward: clipfast's, and the dense one where it fits.

    python -m benchmarks.loss [--batches 1024,4096,32768] [--width 512] [--dtype float32] [--device cpu] [--rounds 1]
        [--dense-gb 8] [--threads N] [--csv PATH]

Each contestant and batch runs in a process of its own, so that none pays for or profits from another's memory. Extra
memory is what the process (on a GPU: PyTorch's allocator) held at its peak beyond what it held before the call, with the
features in place and with memory set aside for their gradients, which both have to return. The dense loss is left out
where its logits, of which its backward holds about six at a time, would take more than --dense-gb.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from clipfast.loss import contrastive_loss
from clipfast.timing import synchronize

OURS, DENSE = "clipfast", "dense"
DENSE_TENSORS = 6
COLUMNS = (
    *(*harness.ENVIRONMENT, "device", "dtype", "batch", "width", "contestant", "status", "extra_mb", "median_s"),
    *("gflops", "loss", "scale_gradient", "note"),
)


def dense_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As open_clip has it, with both matrices of logits."""
    labels = torch.arange(len(image), device=image.device)
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


LOSSES = {OURS: contrastive_loss, DENSE: dense_loss}
