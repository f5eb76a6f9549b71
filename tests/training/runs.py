"""Small runs of `clipfast train`: their arguments, their curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

N, BATCH, STEPS, SAVE_EVERY = 26, 6, 30, 7
TIMINGS = ("samples_per_second", "data_wait")


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    given = {"--model": data / "tiny.json", "--data": data / "pairs", "--out": out, "--steps": STEPS}
    given |= {"--batch-size": BATCH, "--save-every": SAVE_EVERY, "--workers": 0, "--device": "cpu", "--lr": 2e-3}
    return ["train", *(str(word) for pair in given.items() for word in pair), *more]


def curve(out: Path) -> list[dict]:
    """All lines without the timings."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def start(words: list[str], *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "clipfast", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
