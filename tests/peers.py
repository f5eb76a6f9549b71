"""The libraries that parity tests compare with; each function returns a module or skips the calling test."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch


def _give_up(reason: str) -> NoReturn:
    """Skip the calling test, or fail it where the peers are required, as in CI."""
    if os.environ.get("CLIPFAST_REQUIRE_PEERS") == "1":
        pytest.fail(f"{reason} (CLIPFAST_REQUIRE_PEERS=1: no skip)", pytrace=False)
    pytest.skip(reason)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.lru_cache(maxsize=1)
def _declare_torchvision_operators() -> torch.library.Library | None:
    """Make torchvision importable where its compiled operators are missing (a CPU torch from PyPI).

    torchvision registers fake kernels for two of them on import; declaring their schemas is enough. The cache
    keeps the returned library alive: the declarations go with it.
    """
    if not _installed("torchvision"):
        return None
    try:
        importlib.import_module("torchvision")
        return None
    except (RuntimeError, ImportError):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def _import_or_skip(module: str, distribution: str) -> ModuleType:
    if not _installed(module):
        _give_up(f"{distribution} is not installed")
    _declare_torchvision_operators()
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        _give_up(f"{distribution} does not import here: {error}")


def openai_clip() -> ModuleType:
    """The module `clip` of openai/CLIP (distribution `openai-clip`)."""
    return _import_or_skip("clip", "openai-clip")


def transformers_clip() -> ModuleType:
    """The module `transformers` of Hugging Face, which has CLIPModel."""
    return _import_or_skip("transformers", "transformers")


def open_clip() -> ModuleType:
    """The module `open_clip` (distribution `open_clip_torch`)."""
    return _import_or_skip("open_clip", "open_clip_torch")


def open_clip_loss() -> type[torch.nn.Module]:
    """open_clip's ClipLoss alone: the rest of open_clip takes seconds to import, in every process."""
    if not _installed("open_clip"):
        _give_up("open_clip_torch is not installed")
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(folder) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss
