"""The models that training can start from: OpenAI's nine by name, others by a JSON file, any by its weights."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from clipfast.architectures import ARCHITECTURES, VOCABULARY
from clipfast.checkpoints import load
from clipfast.commands import CommandError
from clipfast.model import CLIP, architecture

__all__ = ["make_model", "sizes_of"]


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
