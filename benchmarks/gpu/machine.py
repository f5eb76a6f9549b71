"""What machine this is, and the stages that find out: its facts, its library, its ceilings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from typing import Any

import torch

from benchmarks.gpu.jobs import on_path
from benchmarks.gpu.plans import ROOT
from benchmarks.gpu.run import Run
from clipfast import tuning
from clipfast.bench import ceilings as measured
from clipfast.bench.budget import Budget
from clipfast.bench.environment import environment as shared_facts
from clipfast.bench.environment import nvidia_smi, output
from clipfast.bench.harness import significant
from clipfast.kernels import library, native


def raise_if_lost(device: torch.device) -> None:
    """To be called after an error: raises if no CUDA call works any more in this process. Only a new one helps then."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)


def facts(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the code. No host name, no user, no path."""
    shared = shared_facts()
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


def nvcc_version() -> str:
    path = on_path("nvcc")
    found = re.search(r"release [\d.]+, V([\d.]+)", output(path, "--version")) if path else None
    return found[1] if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def environment(run: Run, budget: Budget) -> None:
    """The machine, for the CSV's name and every row."""
    if run.device.type == "cuda":
        if torch.version.cuda is None or (not torch.cuda.is_available() and not _card()):
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            run.emit(
                "no gpu",
                f"torch {torch.__version__} ({built}) finds no GPU. Run this on a machine with one, or with --dry-run "
                "to see that every stage is wired up.",
            )
            return
        torch.cuda.init()
    found = facts(run.device)
    run.emit("facts", found)
    for name, value in found.items():
        run.say(f"{name}: {value}")
    if library.triton_missing():
        run.note(f"no Triton kernels: {library.triton_missing()}")


def _card() -> bool:
    """Whether the system knows of a GPU, though PyTorch does not: then CUDA did not start, and says why."""
    return os.path.exists("/dev/nvidia0")


def build(run: Run, budget: Budget) -> None:
    """csrc with CMake, where nvcc is; without it the package runs on Triton alone."""
    if run.state.built and not native.missing():
        run.note("csrc was built before")
        return
    missing = [tool for tool in ("cmake", "nvcc") if on_path(tool) is None]
    if run.dry or missing or not (ROOT / "CMakeLists.txt").exists():
        why = "a dry run builds nothing" if run.dry else f"not here: {', '.join(missing) or 'CMakeLists.txt'}"
        run.note(f"CUDA library not built ({why}); it is {native.missing() or 'there already'}"[:150])
        return
    # for this GPU alone: code for every architecture takes several times as long
    architecture = tuning.known(tuning.architecture(run.device))
    folder = ROOT / "build" / f"cmake-sm_{architecture}"
    options = [f"-DCLIPFAST_ARCHITECTURES={architecture}", "-DCLIPFAST_CPU=OFF"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    environment = {**os.environ, "CUDACXX": on_path("nvcc") or ""}
    for command in (configure, ["cmake", "--build", str(folder), "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(1, budget.left()))
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()[-8:]
            run.fail("csrc does not build: " + " | ".join(lines))
            return
    native.LIBRARY.forget()
    if native.missing():
        run.fail(f"csrc is built and does not load: {native.missing()}")
    else:
        run.note(f"csrc built in {budget.spent():.0f} s")


def ceilings(run: Run, budget: Budget) -> None:
    """What this machine gives at best, measured now: every floor below comes from these."""
    torch.set_float32_matmul_precision("highest")
    for name, value in measured.measure(run.device, ("bfloat16", "float16", "float32"), quick=run.dry).rates.items():
        run.ceiling(name, value)
        key, scale = ("gb_per_s", 1e9) if name == "copy" else ("tflops", 1e12)
        run.add({"operator": f"ceiling {name}", "status": "ok", key: significant(value / scale)})
        run.say("ran" if run.dry else f"{name}: {value / scale:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}")
