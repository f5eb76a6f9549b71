"""Who is compared: one small file for each library, called the way its own documentation says.

A peer builds its model once from the same weights as everybody and then prepares, for a tower and a batch, the calls to
time. What a tokenizer or image processor hands over (padding, attention mask, dtype) is prepared and not timed. A
library that is not here raises Missing, which costs its own rows only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

OURS = "clipfast"
PREPACKED = f"{OURS} prepacked"
OPENAI = "openai-clip"
# what the column vs_transformers compares with, by tower
TRANSFORMERS = dict.fromkeys(("image", "both", "train"), "transformers") | {"text": "transformers, pad longest"}

Call = Callable[[], Tensor]
# contestant -> call that returns [B, E], or of "both" the logits [B, B]
Calls = dict[str, Call]


class Spec(NamedTuple):
    """Which model, and how.

    weights: float32 on the device, under openai/CLIP's names.
    folder:  where what is made of these weights may be kept, and found by others; None: nowhere.
    """

    weights: Mapping[str, Tensor]
    architecture: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    folder: Path | None = None


class Batch(NamedTuple):
    """images: [B, 3, R, R] float32.   text: [B, context] int64.   On the spec's device."""

    images: Tensor
    text: Tensor


Prepare = Callable[[str, Batch], Calls]  # (tower, batch); a tower it does not have gives {}


# other runtimes; other ways to write the same model; transformers; compilers of openai-clip, and what is quantised
FIRST, SECOND, THIRD, LAST = range(4)


class Peer(NamedTuple):
    """Somebody to compare with.

    build:        a function of a module, or a partial of one: it goes to a process of its own.
    distribution: whose version is shown.   approximate: computes something else on purpose, so it is never an equal.
    prepares:     seconds that preparing one size takes for each layer, as a first guess.
    exports:      the same of what is done once for all sizes of a tower; without it, who prepares compiles in the first
                  call.
    rank:         who is left out first where time is short: the greatest (LAST down to FIRST).
    devices:      where it runs.   dtypes: names of what it computes in.
    usual:        asked also when nobody names it.
    """

    name: str
    distribution: str
    build: Callable[[Spec], Prepare]
    approximate: bool = False
    prepares: float = 0.0
    exports: float = 0.0
    rank: int = SECOND
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    usual: bool = True

    @property
    def compiles(self) -> bool:
        """Whether the first call of each size compiles."""
        return bool(self.prepares) and not self.exports


class Missing(Exception):
    """The peer is not installed, or does not import; the text says which."""


def known() -> dict[str, Peer]:
    """Everybody by name, ours first; nothing of theirs is imported."""
    from clipfast.bench.peers import compiled, huggingface, onnx, openai, openclip, openvino, ours

    everybody = (
        ours.PEER,
        ours.PACKED,
        openai.PEER,
        openclip.PEER,
        huggingface.PEER,
        *compiled.PEERS,
        *onnx.PEERS,
        openvino.PEER,
        huggingface.FLASH,
    )
    return {peer.name: peer for peer in everybody}


def defaults(device: torch.device) -> list[str]:
    """Names of those who are asked when nobody says whom: all but the slowest way to compile on a CPU."""
    return [name for name, peer in known().items() if device.type in peer.devices and peer.usual]


def version(peer: Peer) -> str:
    """The version of a peer's distribution, empty if it is not installed."""
    if peer.distribution == OURS:
        import clipfast

        return clipfast.__version__
    try:
        return importlib.metadata.version(peer.distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# What the adapters share


def module(name: str, distribution: str) -> ModuleType:
    """The imported module. Raises Missing if it is not installed or does not import."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Missing(f"{distribution} is not installed")
    declare_torchvision_operators()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise Missing(f"{distribution} does not import here: {error}") from error


@functools.lru_cache(maxsize=1)
def declare_torchvision_operators() -> torch.library.Library | None:
    """Make torchvision importable where its compiled operators are missing (a CPU torch from PyPI).

    torchvision registers fake kernels for two of them on import; declaring their schemas is enough. The cache
    keeps the returned library alive: the declarations go with it.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
        return None
    except (RuntimeError, ImportError):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


class uninitialised(TorchFunctionMode):
    """Inside, torch.nn's initialisations do nothing: every parameter is loaded next, and drawing them takes seconds.

    Models are made inside `with spec.device` as well: weights that lie on a GPU do not go through the host again.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def call(
    mode: Callable[[], AbstractContextManager], function: Callable[..., Tensor], *arguments: Any
) -> Callable[[], Tensor]:
    """function(*arguments) under a mode, such as torch.no_grad."""

    def run() -> Tensor:
        with mode():
            return function(*arguments)

    return run
