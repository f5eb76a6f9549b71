"""What a process pays once: import, building, the first call and memory, each contestant in a process of its own.

Importing torch is not counted: everybody needs it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import peers, workload
from clipfast.bench.harness import Row, reason, significant

# of one process, at most; and what one takes at ViT-B/32
LIMIT, SECONDS = 120, 12.0
# torch first, then clipfast: the time of the second is its own
CHILD = """
import sys, time, torch
start = time.perf_counter()
import clipfast
seconds = time.perf_counter() - start
from clipfast.bench import start
start.child(seconds, *sys.argv[1:])
"""
# what each other peer imports
MODULES = {
    "openai-clip": "clip",
    "open_clip": "open_clip",
    "transformers": "transformers.models.clip.modeling_clip",
}


def measure(peer: str, model: str, dtype: str, device: torch.device, captions: Any) -> Row:
    """status "ok" with seconds and bytes, or why there are none."""
    lengths = str(captions) if not str(captions).startswith("file ") else "8-24"
    command = [sys.executable, "-c", CHILD, peer, model, dtype, str(device), lengths]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=_environment(), check=False)
        if done.returncode:
            return {"status": "failed", "note": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"status": "failed", "note": reason(error)}


def _environment() -> dict[str, str]:
    # from a checkout, too, the child must find what this process runs
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def memory(field: str) -> int:
    """VmRSS or VmHWM (the most so far) in bytes; 0 where the system does not say."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0


def forget_peak() -> None:
    with contextlib.suppress(OSError):  # only Linux has it
        Path("/proc/self/clear_refs").write_text("5")


def child(seconds: float, peer: str, model: str, dtype: str, device: str, captions: str) -> None:
    """In the process itself: prints one line of JSON.   seconds: of importing clipfast."""
    row: Row = {"status": "ok", "base_bytes": memory("VmRSS"), "import_s": significant(seconds)}
    if peer in MODULES:
        start = time.perf_counter()
        peers.declare_torchvision_operators()
        importlib.import_module(MODULES[peer])
        row["import_s"] = significant(time.perf_counter() - start)
    sizes, place = ARCHITECTURES[model], torch.device(device)
    weights = workload.random_weights(sizes)
    data = workload.inputs(sizes, 1, workload.Captions.parse(captions))
    start = time.perf_counter()
    prepare = peers.known()[peer].build(peers.Spec(weights, sizes, getattr(torch, dtype), place))
    row["build_s"] = significant(time.perf_counter() - start)
    del weights
    gc.collect()
    forget_peak()
    batch = peers.Batch(*(data[name].to(place) for name in ("image", "text")))
    for tower in workload.TOWERS:
        *_, call = prepare(tower, batch).values()
        for which in ("first", "second"):
            start = time.perf_counter()
            call()
            if place.type == "cuda":
                torch.cuda.synchronize()
            row[f"{which}_{tower}_s"] = significant(time.perf_counter() - start)
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if place.type == "cuda" else memory("VmHWM")
    print(json.dumps(row))
