"""What the stages of one run share: options, device, budget, rows as they are found, and what was wrong."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from clipfast import roofline
from clipfast.bench import environment, harness
from clipfast.bench.budget import Budget
from clipfast.bench.environment import free_name, nvidia_smi, output, slug
from clipfast.bench.harness import Row, significant

ROOT = Path(__file__).resolve().parents[2]
DRY = "dry run: no figure below means anything"

# stage: what it was measured in; "ceilings" rows hold what the machine gives at best.
# operator: or encode_image, encode_text.
# status: ok; part: does less than the operator; WRONG: computes something else, not timed; failed: raised;
#   missing: not installed.
# how: "graph": captured in a CUDA graph and replayed; "calls (why)": launched one by one; "wall": host clock
#   around a synchronised call, for towers.
# median_s, p20_s, p80_s, seconds: of one call, over `rounds` interleaved rounds.
# gb_per_s, tflops: the fewest bytes and operations (clipfast/roofline.py) over the median.   floor_s: their time at the
#   measured ceilings, launch by launch; of_floor: floor_s / median_s.
# vs_eager: times as fast as eager PyTorch (towers: openai/CLIP, where it is not installed transformers).
# ours_is_faster: how many times as fast as this contestant clipfast is.
# rel_rms, cos_gap_p99: errors against float64, of samples.   note: why there is no time.
COLUMNS = (
    *("date", "commit", "gpu", "torch", "triton", "stage", "operator", "model", "shape", "batch", "captions", "dtype"),
    *("contestant", "status", "how", *harness.TIMES, *harness.TAIL, "gb_per_s", "tflops", "floor_s", "of_floor"),
    *("vs_eager", "ours_is_faster", "rel_rms", "cos_gap_p99", "note", "seconds"),
)


class Run:
    """One invocation."""

    def __init__(self, options: argparse.Namespace, budget: Budget, device: torch.device):
        self.options, self.budget, self.device = options, budget, device
        self.facts = facts(device)
        self.rows: list[Row] = []
        self.ceilings: dict[str, float] = {}  # "copy" in bytes/s, dtypes in FLOP/s
        self.wrong: dict[tuple[str, str], str] = {}  # (operator, dtype) -> what; these are not timed
        self.failures: list[str] = []  # correctness, in words
        self.notes: list[str] = []
        self.paste: list[str] = []  # lines for clipfast/tuning.py
        self.jobs: dict[str, Any] = {}  # subprocesses that run beside a stage
        self.stage = "start"
        self._folder = self._name = None
        self._file: IO[str] | None = None
        self._lock = threading.Lock()

    @property
    def dry(self) -> bool:
        return self.options.dry_run

    @property
    def folder(self) -> Path:
        """Where results go: --out, else benchmarks/results; a dry run writes nothing there."""
        return self.options.out or ROOT / "benchmarks" / "results"

    def open(self) -> None:
        """Starts the CSV and writes the environment beside it."""
        if self.dry and self.options.out is None:
            self._file = io.StringIO()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = free_name(self.folder, f"{slug(self.facts['gpu'])}-{self.facts['date']}")
            self._file = path.open("w", newline="")
            path.with_suffix(".json").write_text(json.dumps(self.facts, indent=1) + "\n")
            self.say(f"writing {path.name}")
            self._name = path.stem
        csv.DictWriter(self._file, COLUMNS, lineterminator="\n").writeheader()

    def file(self, kind: str) -> Path | None:
        """A path beside the CSV for a log; none where nothing is kept."""
        return None if self._name is None else self.folder / f"{self._name}-{kind}"

    def add(self, row: Row) -> None:
        """Appends a row to the CSV at once: a run that is cut off keeps what it measured."""
        shared = {name: self.facts[name] for name in ("date", "commit", "gpu", "torch", "triton")}
        full = {**shared, "stage": self.stage, **row}
        with self._lock:
            self.rows.append(full)
            if self._file is not None:
                csv.DictWriter(self._file, COLUMNS, restval="", extrasaction="raise", lineterminator="\n").writerow(
                    full
                )
                self._file.flush()

    def fail(self, text: str, operator: str = "", dtype: str = "") -> None:
        """Something computes the wrong thing; of a named operator nothing is timed in that dtype from now on."""
        self.failures.append(text)
        if operator:
            self.wrong.setdefault((operator, dtype), text)
        self.say(f"WRONG: {text}")

    def note(self, text: str) -> None:
        self.notes.append(f"{self.stage}: {text}")
        self.say(text)

    def say(self, text: str) -> None:
        print(f"[{self.budget.spent():5.0f} s] {self.stage}: {text}", flush=True)


class Stage(NamedTuple):
    name: str
    seconds: float  # at most
    function: Callable[[Run, Budget], None]


def run_stages(run: Run, stages: list[Stage]) -> None:
    """Each in turn and in its own time; one that fails is reported, and the others go on."""
    for stage in stages:
        run.stage = stage.name
        budget = run.budget.part(stage.seconds)
        if not budget.allows(1):
            run.note("not run: out of time")
            continue
        run.say(f"at most {budget.left():.0f} s")
        try:
            stage.function(run, budget)
        except Exception as error:
            run.note(f"stage failed: {harness.reason(error)}")
            if os.environ.get("CLIPFAST_TRACEBACK") == "1":
                raise
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def facts(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the code. No host name, no user, no path."""
    shared = environment.environment()
    found = {name: shared[name] for name in ("date", "clipfast", "commit", "python", "torch", "cpu")}
    found |= {
        "platform": platform.machine(),
        "triton": _triton(),
        "cuda": torch.version.cuda or "",
        "nvcc": nvcc_version(),
    }
    found |= {"cudnn": torch.backends.cudnn.version() or "", "cores": os.cpu_count(), "gpu": "none"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            # as found: nothing here sets a clock or a limit
            "nvidia_smi": nvidia_smi("driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"),
        }
    return found


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def nvcc() -> str | None:
    """The CUDA compiler, also where it is installed but not on the PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def nvcc_version() -> str:
    path = nvcc()
    found = re.search(r"release [\d.]+, V([\d.]+)", output(path, "--version")) if path else None
    return found[1] if found else ""


def rates(run: Run, works: list[roofline.Work], dtype: str, median: float) -> Row:
    """GB/s, TFLOP/s, and how much of the floor's speed this time has."""
    work = roofline.total(works)
    row = {"gb_per_s": significant(work.bytes / median / 1e9), "tflops": significant(work.flops / median / 1e12)}
    if {"copy", dtype} <= set(run.ceilings):
        floor = roofline.seconds(works, run.ceilings[dtype], run.ceilings["copy"])
        row |= {"floor_s": significant(floor), "of_floor": significant(floor / median)}
    return row


def ratios(rows: Mapping[str, Row], eager: str | None, ours: str) -> None:
    """vs_eager: times as fast as eager.   ours_is_faster: how many times as fast as this one ours is."""
    for row in rows.values():
        if "median_s" not in row:
            continue
        if eager and "median_s" in rows.get(eager, {}):
            row["vs_eager"] = significant(rows[eager]["median_s"] / row["median_s"])
        if "median_s" in rows.get(ours, {}):
            row["ours_is_faster"] = significant(row["median_s"] / rows[ours]["median_s"])


def on_path(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin") or None
