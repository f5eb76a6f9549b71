"""`clipfast doctor`: what is installed, and which backend runs each operator, and why not another."""

from __future__ import annotations

import os
import platform
import re
import textwrap
from importlib import metadata

import torch

from clipfast import compat
from clipfast.bench.environment import cpu_name, nvidia_smi
from clipfast.cpu import bfloat16_is_emulated
from clipfast.dispatch import Explanation, explain
from clipfast.kernels import cpu_library, native
from clipfast.words import counted

__all__ = ["report"]

# (names of the distribution, what it is for, whether only with a GPU); the first name is shown
_NEEDED = (("torch",), ("numpy",), ("pillow",), ("tokenizers",), ("ftfy",), ("tqdm",))
_OPTIONAL = (
    (("safetensors",), ".safetensors checkpoints", False),
    (("pyarrow",), "Parquet tables in clipfast train", False),
    (("scikit-learn",), "clipfast demo", False),
    (("scikit-image",), "clipfast demo", False),
    (("matplotlib",), "pictures of clipfast demo, train, bench and profile", False),
    (("triton",), "clipfast's kernels on a GPU", True),
)
# what an older release gets: (first release that gets more, what the older one gets)
_OLDER = {
    "torch": ((2, 8), "before 2.8 the loss on a GPU multiplies float16 and bfloat16 as float32"),
    "triton": (
        (3, 4),
        "before 3.4 linear layers on sm_90 and later take the form of older GPUs: no tensor descriptors",
    ),
}
# clipfast itself uses none of these: bench, demo and tests compare with them
_PEERS = (
    (("openai-clip", "clip"), "openai/CLIP", False),
    (("open_clip_torch",), "open_clip", False),
    (("transformers",), "Hugging Face", False),
    (("flash-attn", "flash_attn"), "Hugging Face's attention on a GPU", True),
)
_ON_A_GPU = ("cuda", "triton")
_USES = (
    ("float32", torch.float32, False),
    ("bfloat16", torch.bfloat16, False),
    ("float16", torch.float16, False),
    ("training", torch.float32, True),
)


def report() -> str:
    """The whole report as plain text; it names no file and no folder of this machine."""
    parts = [_versions(), _machine(), *_missing()]
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parts += [_backends(device) for device in devices]
    return "\n\n".join(parts)


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _with_note(name: str, version: str | None) -> str | None:
    """The version, and what it does without where it is an older one."""
    release = re.match(r"(\d+)\.(\d+)", version or "")
    if name in _OLDER and release is not None:
        newer, note = _OLDER[name]
        return version if (int(release[1]), int(release[2])) >= newer else f"{version} ({note})"
    return version


def _versions() -> str:
    from clipfast import __version__

    rows = [("python", platform.python_version()), ("clipfast", __version__)]
    missing = "NOT INSTALLED: clipfast needs it"
    rows += [(names[0], _with_note(names[0], _version(names)) or missing) for names in _NEEDED]
    parts = [_section("Installed", rows)]
    for title, several, without in (
        ("Optional", _OPTIONAL, "not installed, and needed for {} only: pip install {}"),
        ("Compared with by bench, demo and tests; clipfast needs none of them", _PEERS, "not installed"),
    ):
        rows = []
        for names, purpose, gpu in several:
            absent = without.format(purpose, names[0])
            if gpu and not torch.cuda.is_available():
                absent = f"not installed, and of no use here: it is for {purpose}"
            rows.append((names[0], _with_note(names[0], _version(names)) or absent))
        parts.append(_section(title, rows))
    return "\n\n".join(parts)


def _missing() -> list[str]:
    """A section only where something is missing: else there is nothing to tell."""
    rows = [f"  torch.{entry.name} ({entry.purpose}): {entry.without}" for entry in compat.missing()]
    return ["\n".join(["Private names that this PyTorch lacks", *rows])] if rows else []


def _machine() -> str:
    held = f" (set by {cpu_library.SWITCH})" if os.environ.get(cpu_library.SWITCH) else ""
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"),
        (
            "libclipfast_cpu",
            cpu_library.missing() or f"clipfast's own operators run with {cpu_library.best()}{held}",
        ),
        ("threads", f"{torch.get_num_threads()} on {counted(os.cpu_count() or 1, 'core')}"),
        ("bfloat16", bfloat16_is_emulated() or "the CPU multiplies it"),
        ("float32", f"torch.get_float32_matmul_precision() is {torch.get_float32_matmul_precision()!r}"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            size = f"{gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, CUDA {torch.version.cuda}"
            rows.append((f"GPU {index}", f"{gpu.name}, {size}"))
        rows.append(("libclipfast", native.missing() or "clipfast's own patch embedding runs on a GPU"))
    elif torch.version.cuda is None:
        name = nvidia_smi("name").get("name")
        without = "this PyTorch is built without CUDA"
        rows.append(
            ("GPU", f"{name}, not used: {without}; pytorch.org has one with it" if name else f"none; {without}")
        )
    else:
        rows.append(("GPU", f"none: this PyTorch has CUDA {torch.version.cuda}, but no GPU or no driver answers"))
    return _section("Machine", rows)


def _backends(device: str) -> str:
    found = {use: explain(device, dtype, grad=grad) for use, dtype, grad in _USES}
    operators = [name for name, *_ in next(iter(found.values()))]
    chosen = {(use, name): decision.backend for use, rows in found.items() for name, _, _, decision in rows}
    lines = [f"Backends on {device}", f"  {'':<18}" + "".join(f"{use:<12}" for use in found)]
    lines += [f"  {name:<18}" + "".join(f"{chosen[use, name]:<12}" for use in found) for name in operators]
    return "\n".join([*(line.rstrip() for line in lines), "  Why not another:", *_reasons(found)])


def _reasons(found: dict[str, Explanation]) -> list[str]:
    """For each backend the reasons against it, each with the uses and operators that it concerns."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    on_a_gpu = torch.cuda.is_available()
    for use, rows in found.items():
        for operator, _, _, decision in rows:
            for backend, why in decision.others:
                if backend in _ON_A_GPU and not on_a_gpu:
                    # whatever else they lack does not matter here
                    backend, why = ", ".join(_ON_A_GPU), "run on a GPU"
                reasons.setdefault((backend, why), {}).setdefault(use, []).append(operator)
    lines = []
    for backend, why in sorted(reasons):
        uses = reasons[backend, why]
        operators = list(dict.fromkeys(name for names in uses.values() for name in names))
        where = ", ".join(operators) if len(operators) < len(next(iter(found.values()))) else "all"
        text = f"{backend}: {why} [{where}" + (f"; {', '.join(uses)}]" if len(uses) < len(found) else "]")
        lines += textwrap.wrap(text, 112, initial_indent="    ", subsequent_indent="      ")
    return lines


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:<16}{value}" for name, value in rows)])
