"""Loads and saves CLIP checkpoints: OpenAI's archives, state dicts, open_clip, Hugging Face, safetensors.

`load` is openai/CLIP's, with two more keywords. `read_checkpoint` gives the weights alone.

The activation is not a weight. OpenAI's archives are QuickGELU; so is a bare state dict under openai/CLIP's
names, because openai/CLIP itself takes it so. Hugging Face and open_clip weights come in both kinds: their
config file is read when it lies beside them, and otherwise the caller is asked. `save` records it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import check_file, size_of, write_atomically
from ..inputs import is_here
from ..words import counted
from . import archive, layouts
from .archive import CheckpointError
from .download import MODELS, available_models, download
from .layouts import ACTIVATIONS, from_huggingface, to_huggingface
from .validation import check_state_dict

if TYPE_CHECKING:
    from ..model import CLIP

__all__ = [
    "MODELS",
    "Checkpoint",
    "CheckpointError",
    "available_models",
    "check_state_dict",
    "download",
    "from_huggingface",
    "load",
    "read_checkpoint",
    "save",
    "to_huggingface",
]

StateDict = Mapping[str, torch.Tensor]
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file, under openai/CLIP's names, on the CPU, in the dtypes of the file."""

    state_dict: OrderedDict[str, torch.Tensor]
    layout: str  # "openai", "huggingface" or "open_clip": how it was laid out in the file
    activation: str | None  # "quick_gelu", "gelu", or None where nothing says
    source: str


# ---- loading a model ----


def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    activation: str | None = None,
    prepack: bool = False,
) -> tuple[CLIP, Callable]:
    """Load a CLIP model and its image preprocessing, as openai/CLIP's `clip.load` does.

    name:          one of `available_models()`, or the path of a checkpoint file or of a Hugging Face or
                   open_clip folder.
    device:        default "cuda" if there is one, else "cpu".
    jit:           accepted for openai/CLIP's sake; warns, and returns the ordinary model.
    download_root: folder for downloads; default ~/.cache/clip.
    dtype:         torch.float32, float16 or bfloat16, or such a name ("fp16", "bf16", ...). Half precision
                   means the weights of convolutions, linear layers and projections; the rest stays float32.
                   Default: float32 on a CPU (a float32 file keeps its precision), float16 elsewhere.
                   A CPU that only emulates bfloat16 is named in a warning, once.
    activation:    "quick_gelu" or "gelu", for checkpoints that do not say.
    prepack:       for a program that only serves, on a CPU: `model.prepack_weights()`, faster at one image or a few
                   captions for as much memory again as the linear layers take.
    Returns:       (model in eval mode with gradients enabled, preprocess).
    Raises:        RuntimeError on a GPU that is not there, an unknown name or failed download; CheckpointError
                   (a RuntimeError) on a file that cannot be used; ValueError on a bad dtype, or an
                   activation that is missing, unknown, or contradicts the checkpoint, or on prepack off a CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if not is_here(place):
        # before a download
        raise RuntimeError(f'there is no device "{place}": PyTorch {torch.__version__} sees {_gpus()}')
    dtype = _resolve_dtype(dtype, place)
    if prepack and place.type != "cpu":
        raise ValueError(f'prepack=True is for a CPU, and device is "{place}": pass device="cpu", or leave prepack out')
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if jit:
        warnings.warn(
            "clipfast has no TorchScript model; jit=True gives the ordinary one, which takes the same calls",
            stacklevel=2,
        )
    # what openai/CLIP looks up there, programs replace there
    from .. import clip
    from ..cpu import warn_of_emulation
    from ..model import convert_weights

    if name in MODELS:
        path = clip._download(MODELS[name], download_root or os.path.expanduser("~/.cache/clip"))
    elif os.path.exists(os.path.expanduser(name)):
        path = os.path.expanduser(os.fspath(name))
    else:
        why = ": there is no such file or folder" if _looks_like_a_path(name) else ""
        raise RuntimeError(f"Model {name} not found{why}; available models = {available_models()}")

    checkpoint = read_checkpoint(path)
    activation = _resolve_activation(checkpoint, activation)
    check_state_dict(checkpoint.state_dict, source=checkpoint.source)
    with _NoInitialisation():
        options: dict[str, Any] = {} if activation == "quick_gelu" else {"activation": activation}
        model = clip.build_model(checkpoint.state_dict, **options)
    # before the move: half the bytes cross the bus
    if dtype == torch.float32:
        model.float()
    else:
        convert_weights(model, *([] if dtype == torch.float16 else [dtype]))
    if dtype == torch.bfloat16 and place.type == "cpu":
        warn_of_emulation()
    resolution: Any = model.visual.input_resolution
    model = model.to(place).eval()
    if prepack:
        model.prepack_weights()
    return model, clip._transform(resolution)


class _NoInitialisation(torch.overrides.TorchFunctionMode):
    """Leaves new parameters unset. Drawing those of ViT-B/32 for nothing took 1.5 of 2.2 s on one core."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # most of torch.nn.init passes through here by name, the rest by what it calls
        named = getattr(func, "__module__", None) == "torch.nn.init"
        if named or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _gpus() -> str:
    return counted(torch.cuda.device_count(), "GPU") if torch.cuda.is_available() else 'no GPU; use device="cpu"'


def _looks_like_a_path(name: str | os.PathLike[str]) -> bool:
    # "ViT-B/23" has a slash too
    return not isinstance(name, str) or Path(name).is_absolute() or Path(name).suffix in (*_SUFFIXES, ".ckpt", ".zip")


def _resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    resolved = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES.values():
        raise ValueError(f"dtype must be float32, float16 or bfloat16 (or its name), got {dtype!r}")
    return resolved


def _resolve_activation(checkpoint: Checkpoint, requested: str | None) -> str:
    known = checkpoint.activation
    if known and requested and known != requested:
        raise ValueError(f"activation={requested!r} contradicts {checkpoint.source}, a {known} model")
    if known or requested:
        return known or requested
    if checkpoint.layout == "openai":
        return "quick_gelu"
    raise ValueError(
        f"{checkpoint.source} does not say which activation it was trained with, and {checkpoint.layout} "
        'models come with either: pass activation="quick_gelu" or activation="gelu" (see its model card)'
    )


# ---- reading ----


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the weights of a checkpoint file, or of a Hugging Face or open_clip folder, onto the CPU.

    Never runs code from the file: pickles are read by torch's weights-only reader, TorchScript archives by
    one that knows tensors alone.
    Raises: CheckpointError if the file is damaged, is something else, or holds another kind of model;
            FileNotFoundError.
    """
    path = Path(path).expanduser()
    files = archive.files_of_folder(path) if path.is_dir() else [path]
    contents = [archive.read_file(file) for file in files]
    weights, activation, from_open_clip = layouts.unwrap(contents[0].values, str(path))
    for shard in contents[1:]:
        weights.update(layouts.unwrap(shard.values, str(path))[0])
    weights, layout = layouts.standardise(weights, str(path))
    first = contents[0]
    if first.is_torchscript:
        activation = "gelu" if first.uses_gelu else "quick_gelu"
    activation = activation or first.metadata.get("clipfast_activation")
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"{path} records the unknown activation {activation!r}; update clipfast")
        return Checkpoint(weights, layout, activation, str(path))

    beside = files[0].parent / ("config.json" if layout == "huggingface" else archive.OPEN_CLIP_CONFIG)
    if layout == "openai" and (from_open_clip or files[0].name.startswith("open_clip") or beside.is_file()):
        layout = "open_clip"
    if beside.is_file() and layout != "openai":
        read = layouts.huggingface_activation if layout == "huggingface" else layouts.open_clip_activation
        activation = read(archive.read_json(beside), str(beside))
    elif layout == "openai":
        _warn_head_width(weights, str(path))
    else:
        layouts.check_head_width(weights, str(path))
    return Checkpoint(weights, layout, activation, str(path))


def _warn_head_width(weights: StateDict, source: str) -> None:
    # openai/CLIP would take such a state dict, so it loads, but not in silence
    try:
        layouts.check_head_width(weights, source)
    except CheckpointError as error:
        warnings.warn(f"{error}. Loading it as heads of 64, as openai/CLIP does", stacklevel=3)


# ---- saving ----


def save(
    model: torch.nn.Module | Checkpoint | StateDict,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    activation: str | None = None,
) -> None:
    """Write weights under openai/CLIP's names, so that a killed process leaves the old file or the new one.

    model:      a CLIP, a `Checkpoint`, or a state dict in any layout that `read_checkpoint` knows.
    format:     "pt" or "safetensors"; default by the suffix of the path (.pt, .pth, .bin or .safetensors).
    activation: needed for a bare state dict that does not say, and only there.
    Raises:     ValueError on an unknown format, or an activation that is missing, unknown or contradicted; OSError,
                before the work, if the file cannot be written, and naming it if the disk is full.

    A QuickGELU .pt file is a bare state dict, which openai/CLIP loads too; the activation is noted in its
    `_metadata`. openai/CLIP cannot compute GELU and would not notice, so a GELU .pt file is
    {"state_dict": ..., "clipfast": ...}, which open_clip and clipfast read and openai/CLIP rejects.
    """
    path = Path(path)
    if format is None:
        format = {".safetensors": "safetensors"}.get(path.suffix, "pt")
        if path.suffix not in _SUFFIXES:
            raise ValueError(f'{path} has a suffix that names no format: use .pt or .safetensors, or format="pt"')
    if format not in ("pt", "safetensors"):
        raise ValueError(f'format must be "pt" or "safetensors", got {format!r}')
    check_file(path)
    weights, activation = _weights_to_save(model, activation)
    record = {"activation": activation, "version": _version()}
    if format == "safetensors":
        library = archive.require_safetensors(path)
        metadata = {"format": "pt", **{f"clipfast_{key}": value for key, value in record.items()}}
        write_atomically(path, lambda file: library.torch.save_file(weights, file.name, metadata), size_of(weights))
        return
    values: Any = {"state_dict": weights, "clipfast": record}
    if activation == "quick_gelu":
        # load_state_dict looks up each module's entry and ignores what it does not know
        values = weights
        values._metadata = OrderedDict({"": {"activation": activation, "clipfast": _version()}})
    write_atomically(path, lambda file: torch.save(values, file), size_of(weights))


def _weights_to_save(
    model: torch.nn.Module | Checkpoint | StateDict, requested: str | None
) -> tuple[OrderedDict[str, torch.Tensor], str]:
    values: StateDict
    if isinstance(model, Checkpoint):
        values, known = model.state_dict, model.activation
    elif isinstance(model, torch.nn.Module):
        values, known = model.state_dict(), _activation_of(model)
    else:
        values, known = model, None
    weights, recorded, _ = layouts.unwrap(values, "the state dict")
    weights, _ = layouts.standardise(weights, "the state dict")
    known = known or recorded
    if (known or requested) not in ACTIVATIONS:
        raise ValueError(
            'the state dict does not say which activation it was trained with: pass activation="quick_gelu" '
            f'(all of OpenAI\'s models) or activation="gelu", got {requested!r}'
        )
    if known and requested and known != requested:
        raise ValueError(f"activation={requested!r} contradicts the model, which is a {known} model")
    # clones: views would drag their whole storage into the file, and safetensors refuses shared memory
    clones = ((n, t.detach().cpu().clone(memory_format=torch.contiguous_format)) for n, t in weights.items())
    return OrderedDict(clones), known or requested


def _activation_of(model: torch.nn.Module) -> str | None:
    # by the names that openai/CLIP, open_clip and this library share, under whatever wraps the model
    modules = [module for name, module in model.named_modules() if name.endswith(".mlp.gelu")]
    kinds = {f"{type(module).__name__}({getattr(module, 'approximate', '')})" for module in modules}
    known = {"QuickGELU()": "quick_gelu", "GELU(none)": "gelu"}
    return known.get(kinds.pop()) if len(kinds) == 1 else None


def _version() -> str:
    return getattr(sys.modules["clipfast"], "__version__", "unknown")
