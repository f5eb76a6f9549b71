"""Where and with what a result was measured, and how busy it was. No host name, no user, no path."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import clipfast
from clipfast.bench.harness import Row
from clipfast.cpu import bfloat16_is_emulated

ENVIRONMENT = ("date", "clipfast", "commit", "python", "torch", "cpu", "cpu_kind", "capability", "threads", "load")
CPUINFO = Path("/proc/cpuinfo")
# what a CPU multiplies with, and the flags that say so in /proc/cpuinfo; the first that it has counts
FORMS = {
    "amx": {"amx_tile", "amx_bf16"},
    "avx512_bf16": {"avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma"},
    "baseline": set(),
}


def environment() -> Row:
    """Where and with what a result was measured, and how busy it was. No host name, no user, no path."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "clipfast": clipfast.__version__,
        "commit": commit(Path(__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cpu_kind": cpu_kind(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "",
    }


def warn_if_busy(facts: Row) -> None:
    """Say so on stderr if something else is running: two thread pools on one core wait for each other."""
    if facts["load"] != "" and facts["load"] > 0.5:
        print(f"warning: load average {facts['load']:g} before the start; time on a quiet machine", file=sys.stderr)


def warn_if_emulated(device: torch.device, dtypes: Iterable[str]) -> None:
    """Say so on stderr if bfloat16 is to be timed on a CPU that only emulates it."""
    if device.type == "cpu" and "bfloat16" in dtypes and (reason := bfloat16_is_emulated()):
        print(f"warning: {reason}", file=sys.stderr)


def cpu_name() -> str:
    """As the system calls it."""
    return _cpu().get("model name") or platform.processor() or platform.machine()


def cpu_kind() -> str:
    """What tells two kinds of CPU apart, as part of a file's name: "amd-epyc-25-17-avx512_bf16", family and model.

    A vendor may call several kinds "AMD EPYC". What libraries are held to does not count. Where the system does not say
    more, the name alone.
    """
    found = _cpu()
    name = slug(re.sub(r"\((r|tm)\)|(cpu )?@.*", "", cpu_name().lower()))
    if not {"cpu family", "model", "flags"} <= set(found):
        return name
    flags = set(found["flags"].split())
    form = next(form for form, needed in FORMS.items() if needed <= flags)
    return f"{name}-{found['cpu family']}-{found['model']}-{form}"


def _cpu() -> dict[str, str]:
    """What /proc/cpuinfo says of the first core."""
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def commit(file: Path) -> str:
    """Of the checkout that has this file, "+" behind it if tracked files differ; empty outside a checkout."""
    file = file.resolve()

    def git(*arguments: str) -> str:
        # no optional locks: a benchmark must not touch the index
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=file.parent, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # an installed copy may lie inside somebody else's checkout
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def clock(device: torch.device) -> dict[str, Any]:
    """How fast the machine runs now, as far as it says: nothing here sets a clock or a limit.

    Returns: of a CPU "mhz", the mean over cores, "governor" and "load"; of a GPU what nvidia-smi says of clocks, power
             and temperature. What is not known is left out.
    """
    if device.type == "cuda":
        return nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu")
    found: dict[str, Any] = {}
    try:
        speeds = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", CPUINFO.read_text(), flags=re.MULTILINE)
    except OSError:
        speeds = []
    if speeds:
        found["mhz"] = round(sum(map(float, speeds)) / len(speeds))
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file():
        found["governor"] = governor.read_text().strip()
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    return found


def mhz(device: torch.device) -> float | str:
    """The clock now, of the GPU or the mean of the CPU's cores; "" where it is not known."""
    found = clock(device)
    text = str(found.get("clocks.sm" if device.type == "cuda" else "mhz", "")).partition(" ")[0]
    return float(text) if text.replace(".", "", 1).isdigit() else ""


def available_bytes(device: torch.device) -> float:
    """Memory that may still be taken, infinity where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return 1024.0 * int(found[1]) if found else float("inf")


def cache_bytes() -> int:
    """What the last caches of the CPU hold together, as far as the system says; else 0."""
    found: dict[str, int] = {}
    for core in Path("/sys/devices/system/cpu").glob("cpu[0-9]*"):
        levels = sorted(core.glob("cache/index[0-9]"))
        try:
            # the same cache is listed under each core that shares it
            shared, size = ((levels[-1] / name).read_text().strip() for name in ("shared_cpu_list", "size"))
            found[shared] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError, IndexError):
            continue
    return sum(found.values())


def output(*command: str) -> str:
    """What a command prints, empty if it is not here or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def nvidia_smi(query: str) -> dict[str, str]:
    """Field -> value of the first GPU, as found; empty without nvidia-smi."""
    line = output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").partition("\n")[0]
    return dict(zip(query.split(","), (part.strip() for part in line.split(",")), strict=False)) if line else {}


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") or "gpu"


def free_name(folder: Path, stem: str) -> Path:
    """stem.csv, or with -2, -3 ... behind it: no earlier result is overwritten."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for name in names if not (path := folder / f"{name}.csv").exists())
