"""The models that training can start from: OpenAI's nine by name, others by a JSON file, any by its weights."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from clipfast.checkpoints import load
from clipfast.commands import CommandError
from clipfast.model import CLIP, architecture

__all__ = ["ARCHITECTURES", "make_model", "sizes_of"]

VOCABULARY = 49408


def _sizes(embed_dim: int, resolution: int, layers, vision_width: int, patch: int | None, text_width: int) -> dict:
    return {
        "embed_dim": embed_dim,
        "image_resolution": resolution,
        "vision_layers": layers,
        "vision_width": vision_width,
        "vision_patch_size": patch,
        "context_length": 77,
        "vocab_size": VOCABULARY,
        "transformer_width": text_width,
        "transformer_heads": text_width // 64,
        "transformer_layers": 12,
    }


# Radford et al. 2021, tables 19 and 20
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "RN50": _sizes(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": _sizes(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": _sizes(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": _sizes(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": _sizes(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": _sizes(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _sizes(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _sizes(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _sizes(768, 336, 24, 1024, 14, 768),
}


def sizes_of(name: str) -> dict[str, Any]:
    """Arguments of CLIP: of one of the nine, or as a JSON file has them.

    Raises: CommandError for an unknown name, a file that is no JSON object, or arguments that CLIP does not take.
    """
    if name in ARCHITECTURES:
        return dict(ARCHITECTURES[name])
    if not name.endswith(".json"):
        raise CommandError(f"unknown architecture {name!r}: {', '.join(ARCHITECTURES)}, or a .json file")
    try:
        sizes = json.loads(Path(name).read_text("utf-8"))
    except ValueError as error:
        raise CommandError(f"{name} is not JSON: {error}") from error
    known = {k: v for k, v in inspect.signature(CLIP).parameters.items() if k != "vision_heads"}
    needed = [key for key, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    wrong = [f"unknown {key}" for key in sizes if key not in known] if isinstance(sizes, dict) else ["no object"]
    wrong += [f"no {key}" for key in needed if key not in sizes]
    if wrong:
        raise CommandError(f"{name} does not describe a CLIP: {', '.join(wrong)}; it needs {', '.join(needed)}")
    heads = max(1, sizes["transformer_width"] // 64)
    if sizes["transformer_heads"] != heads:
        # OpenAI's layout does not say, so the exported model would be another one
        raise CommandError(f"{name}: transformer_heads must be transformer_width // 64 = {heads}")
    return sizes


def make_model(name: str | None, init: str | None, activation: str | None = None) -> CLIP:
    """A float32 model on the CPU: with random weights of this architecture, or with the weights of a checkpoint.

    name: for `sizes_of`.   init: for `clipfast.load`.   With both, the weights must be of this architecture.
    Raises: CommandError if they are not, or if the tokenizer's ids do not fit; what `load` raises.
    """
    sizes = sizes_of(name) if name is not None else {}
    if init is None:
        if activation is not None:
            sizes["activation"] = activation
        try:
            model = CLIP(**sizes)
        except (TypeError, ValueError) as error:
            raise CommandError(f"{name} does not describe a CLIP: {error}") from error
    else:
        model = load(init, "cpu", dtype="float32", activation=activation)[0]
        found = architecture(model.state_dict())
        # lists, in JSON, are tuples
        other = [key for key in found if key in sizes and json.dumps(found[key]) != json.dumps(sizes[key])]
        if other:
            differences = ", ".join(f"{key} {found[key]} in place of {sizes[key]}" for key in other)
            raise CommandError(f"{init} is not a {name}: {differences}")
    if model.vocab_size != VOCABULARY:
        raise CommandError(f"the model's vocabulary has {model.vocab_size} ids, the tokenizer's {VOCABULARY}")
    if not isinstance(model.visual.input_resolution, int):
        raise CommandError(f"images are trained square, got image_resolution {model.visual.input_resolution}")
    return model
