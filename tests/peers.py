"""The libraries that parity tests compare with; each function returns a module or skips the calling test."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

from clipfast.bench.peers import Missing, module


def _give_up(reason: str) -> NoReturn:
    """Skip the calling test, or fail it where the peers are required, as in CI."""
    if os.environ.get("CLIPFAST_REQUIRE_PEERS") == "1":
        pytest.fail(f"{reason} (CLIPFAST_REQUIRE_PEERS=1: no skip)", pytrace=False)
    pytest.skip(reason)


def _import_or_skip(name: str, distribution: str) -> ModuleType:
    try:
        return module(name, distribution)
    except Missing as error:
        _give_up(str(error))


def openai_clip() -> ModuleType:
    """The module `clip` of openai/CLIP (distribution `openai-clip`)."""
    return _import_or_skip("clip", "openai-clip")


def transformers_clip() -> ModuleType:
    """The module `transformers` of Hugging Face, which has CLIPModel."""
    return _import_or_skip("transformers", "transformers")


def open_clip() -> ModuleType:
    """The module `open_clip` (distribution `open_clip_torch`)."""
    return _import_or_skip("open_clip", "open_clip_torch")


def onnxruntime() -> ModuleType:
    """The module `onnxruntime`, with the two that PyTorch exports with."""
    for name in ("onnx", "onnxscript"):
        _import_or_skip(name, name)
    return _import_or_skip("onnxruntime", "onnxruntime")


def open_clip_loss() -> type[torch.nn.Module]:
    """open_clip's ClipLoss alone: the rest of open_clip takes seconds to import, in every process."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        _give_up("open_clip_torch is not installed")
    (folder,) = package.submodule_search_locations
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(folder) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss
