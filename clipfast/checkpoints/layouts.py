"""The three ways a CLIP is laid out in a state dict, told apart and brought to openai/CLIP's names.

openai:      `visual.*`, `transformer.resblocks.*`, `text_projection`, ...: the names of this library.
huggingface: `vision_model.*`, `text_model.*`; q, k and v apart, both projections transposed.
open_clip:   openai's names, or the same with the text tower under `text.`; many are GELU models, and the
             weights do not say so.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from .archive import CheckpointError

ACTIVATIONS = ("quick_gelu", "gelu")
StateDict = Mapping[str, torch.Tensor]

# what OpenAI's archives, open_clip and Hugging Face store beside the weights
_NOT_WEIGHTS = re.compile(
    r"(input_resolution|context_length|vocab_size)$|(.*\.)?attn_mask$|(text|vision)_model\.embeddings\.position_ids$"
)
_WRAPPERS = ("state_dict", "model_state_dict", "model")

_TOWERS = {  # ours -> Hugging Face
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_BLOCK_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SAME_TENSOR = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # their spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_QKV = ("q_proj", "k_proj", "v_proj")


# ---- what a file held -> a state dict ----


def unwrap(values: Any, source: str) -> tuple[OrderedDict[str, torch.Tensor], str | None, bool]:
    """Find the weights in an unpickled object and strip what wrappers added to their names.

    Returns: (state dict, activation recorded by clipfast or None, whether open_clip's trainer wrote it).
    Raises:  CheckpointError if there are no weights in it.
    """
    activation = None
    from_open_clip = False
    # bounded: a hostile pickle can hold itself
    for _ in range(4):
        if not isinstance(values, Mapping):
            break
        activation = activation or recorded_activation(values)
        key = next((k for k in _WRAPPERS if isinstance(values.get(k), Mapping)), None)
        if key is None:
            break
        from_open_clip |= {"epoch", "name", "state_dict"} <= set(values)
        values = values[key]
    if not isinstance(values, Mapping) or not any(isinstance(v, torch.Tensor) for v in values.values()):
        raise CheckpointError(f"{source} holds a {type(values).__name__} without weights; save its model.state_dict()")
    odd = [str(k) for k, v in values.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if odd:
        raise CheckpointError(f"{source} mixes weights and other values ({some(odd)}); save model.state_dict() alone")
    return _strip_prefix(values), activation, from_open_clip


def recorded_activation(state_dict: Mapping[str, Any]) -> str | None:
    """The activation that clipfast wrote beside the weights, if it did."""
    entry = state_dict.get("clipfast")
    if isinstance(entry, Mapping):
        return entry.get("activation")
    # torch keeps one entry per module here; ours is in the root module's, which a wrapper moves to `module`
    entries = getattr(state_dict, "_metadata", None)
    modules = entries.values() if isinstance(entries, Mapping) else ()
    recorded = (module.get("activation") for module in modules if isinstance(module, Mapping))
    return next((activation for activation in recorded if activation), None)


def _strip_prefix(state_dict: StateDict) -> OrderedDict[str, torch.Tensor]:
    # torch.compile puts `_orig_mod.` before any module; DDP and trainers put one prefix before everything
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}
    anchor = next((name for name in named if name.endswith(".logit_scale")), "logit_scale")
    prefix = anchor.removesuffix("logit_scale")
    if not all(name.startswith(prefix) for name in named):
        prefix = ""
    return OrderedDict((name.removeprefix(prefix), tensor.detach()) for name, tensor in named.items())


def standardise(state_dict: StateDict, source: str) -> tuple[OrderedDict[str, torch.Tensor], str]:
    """Bring any of the three layouts to openai/CLIP's names.

    Returns: (state dict, layout it came in).
    Raises:  CheckpointError if it is a model that openai/CLIP's architecture cannot hold.
    """
    weights = OrderedDict((k, v) for k, v in state_dict.items() if not _NOT_WEIGHTS.match(k))
    if any(name.startswith(("text_model.", "vision_model.")) for name in weights):
        return from_huggingface(weights, source), "huggingface"
    if any(name.startswith("visual.trunk.") for name in weights):
        raise CheckpointError(f"{source} has a timm image tower (visual.trunk.*), not one of openai/CLIP's")
    if any(name.startswith("text.") for name in weights):
        renamed = OrderedDict((name.removeprefix("text."), tensor) for name, tensor in weights.items())
        return _scalar_logit_scale(renamed), "open_clip"
    return _scalar_logit_scale(weights), "openai"


def _scalar_logit_scale(weights: OrderedDict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    # open_clip stores it as [1] when it is sharded in training
    scale = weights.get("logit_scale")
    if scale is not None and scale.numel() == 1:
        weights["logit_scale"] = scale.reshape(())
    return weights


# ---- Hugging Face ----


def from_huggingface(state_dict: StateDict, source: str = "state dict") -> OrderedDict[str, torch.Tensor]:
    """Rename transformers' CLIPModel weights to openai/CLIP's; q, k and v are joined. Exact, dtypes kept.

    Raises: CheckpointError on a name that CLIPModel does not have, or q without its k and v.
    """
    ours: OrderedDict[str, torch.Tensor] = OrderedDict()
    same = {theirs: name for name, theirs in _SAME_TENSOR.items()}
    transposed = {theirs: name for name, theirs in _TRANSPOSED.items()}
    parts = {theirs: name for name, theirs in _BLOCK_PARTS.items()}
    unexpected = []
    for name, tensor in state_dict.items():
        tower = next(((us, them) for us, them in _TOWERS.items() if name.startswith(them)), None)
        if name in same:
            ours[same[name]] = tensor
        elif name in transposed:
            ours[transposed[name]] = tensor.t().contiguous()
        elif tower is not None:
            layer, _, rest = name.removeprefix(tower[1]).partition(".")
            part, _, kind = rest.rpartition(".")  # mlp.fc1, weight
            if part in parts:
                ours[f"{tower[0]}{layer}.{parts[part]}.{kind}"] = tensor
            elif part == "self_attn.q_proj":
                joined = [state_dict.get(name.replace("q_proj", p)) for p in _QKV]
                if any(t is None for t in joined):
                    raise CheckpointError(f"{source} has {name} without its k_proj or v_proj")
                ours[f"{tower[0]}{layer}.attn.in_proj_{kind}"] = torch.cat(joined)
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                unexpected.append(name)
        elif not _NOT_WEIGHTS.match(name):
            unexpected.append(name)
    if unexpected:
        raise CheckpointError(
            f"{source} has {len(unexpected)} weights that transformers' CLIPModel has not: {some(unexpected)}"
        )
    return ours


def to_huggingface(state_dict: StateDict) -> OrderedDict[str, torch.Tensor]:
    """Rename openai/CLIP's weights to transformers' CLIPModel; the exact inverse of `from_huggingface`.

    Raises: ValueError on a ResNet (transformers has none) or on a name that openai/CLIP does not have.
    """
    theirs: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, tensor in state_dict.items():
        tower = next(((us, them) for us, them in _TOWERS.items() if name.startswith(us)), None)
        if name in _SAME_TENSOR:
            theirs[_SAME_TENSOR[name]] = tensor
        elif name in _TRANSPOSED:
            theirs[_TRANSPOSED[name]] = tensor.t().contiguous()
        elif tower is not None:
            layer, _, rest = name.removeprefix(tower[0]).partition(".")
            part, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for projection, piece in zip(_QKV, tensor.chunk(3), strict=True):
                    theirs[f"{tower[1]}{layer}.self_attn.{projection}.{kind}"] = piece.clone()
            elif part in _BLOCK_PARTS:
                theirs[f"{tower[1]}{layer}.{_BLOCK_PARTS[part]}.{kind}"] = tensor
            else:
                raise ValueError(f"{name} has no place in transformers' CLIPModel")
        elif not _NOT_WEIGHTS.match(name):
            raise ValueError(f"{name} has no place in transformers' CLIPModel (it has no ResNet image tower)")
    return theirs


# ---- configuration files beside the weights ----


def huggingface_activation(config: Mapping[str, Any], source: str) -> str:
    """The activation named by a Hugging Face config.json, checked to describe openai/CLIP's architecture.

    Raises: CheckpointError if the two towers differ or if the model is not one that this library computes.
    """
    if config.get("model_type") != "clip":
        raise CheckpointError(f"{source} describes a {config.get('model_type')!r} model, not a 'clip' model")
    activations = []
    for part in ("text_config", "vision_config"):
        tower = config.get(part) or {}
        # what a config.json leaves out has transformers' default; the head count has one as well, by tower
        activations.append(tower.get("hidden_act", "quick_gelu"))
        width = tower.get("hidden_size", 512 if part == "text_config" else 768)
        heads = tower.get("num_attention_heads", 8 if part == "text_config" else 12)
        if width != 64 * heads:
            raise CheckpointError(_other_head_width(f"{source} ({part})", f"{width / heads:g}"))
        if tower.get("layer_norm_eps", 1e-5) != 1e-5:
            raise CheckpointError(f"{source} ({part}) has layer_norm_eps {tower['layer_norm_eps']}, not 1e-5")
    text = config.get("text_config") or {}
    eos, vocabulary = text.get("eos_token_id", 49407), text.get("vocab_size", 49408)
    # 2 is what early configs say for "the greatest id", which is what openai/CLIP and clipfast look for
    if eos not in (2, vocabulary - 1):
        warnings.warn(
            f"{source}: transformers pools text at id {eos}, clipfast at each text's greatest id",
            stacklevel=4,
        )
    if activations[0] != activations[1] or activations[0] not in ACTIVATIONS:
        raise CheckpointError(
            f"{source} names the activations {activations[0]!r} (text) and {activations[1]!r} (image); "
            f"clipfast computes one of {', '.join(ACTIVATIONS)} in both towers"
        )
    return activations[0]


_MEAN = (0.48145466, 0.4578275, 0.40821073)
# every other option of an open_clip config that is switched on changes what the model computes
_OPEN_CLIP_NEUTRAL = {
    "": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"}
    | {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained"},
}
_OPEN_CLIP_DEFAULTS = {
    "pool_type": ("tok", "argmax"),
    "proj_type": ("linear",),
    "pos_embed_type": ("learnable",),
}


def open_clip_activation(config: Mapping[str, Any], source: str) -> str:
    """The activation named by an open_clip_config.json, checked to describe openai/CLIP's architecture.

    Raises: CheckpointError if the model is not one that this library computes.
    """
    model = config.get("model_cfg", config)
    sections = {
        "": model,
        "vision_cfg": model.get("vision_cfg") or {},
        "text_cfg": model.get("text_cfg") or {},
    }
    for section, options in sections.items():
        for option, value in options.items():
            known = option in _OPEN_CLIP_NEUTRAL[section] or value in _OPEN_CLIP_DEFAULTS.get(option, ())
            if value and not known:
                raise CheckpointError(f"{source} sets {option} = {value!r}, which openai/CLIP does not have")
    vision, text = sections["vision_cfg"], sections["text_cfg"]
    if vision.get("head_width", 64) != 64:
        raise CheckpointError(_other_head_width(f"{source} (image tower)", f"{vision['head_width']}"))
    if text.get("width", 512) != 64 * text.get("heads", 8):
        raise CheckpointError(_other_head_width(f"{source} (text tower)", "another width"))
    mean = (config.get("preprocess_cfg") or {}).get("mean") or _MEAN
    if any(abs(a - b) > 1e-3 for a, b in zip(mean, _MEAN, strict=True)):
        warnings.warn(
            f"{source}: trained on images normalised by mean {mean}, clipfast's preprocess uses {_MEAN}",
            stacklevel=4,
        )
    return "quick_gelu" if model.get("quick_gelu") else "gelu"


# image tower widths of ViT-H, ViT-g and ViT-bigG as published: 16 heads each
_WIDE_HEADS = {1280: 80, 1408: 88, 1664: 104}


def check_head_width(state_dict: StateDict, source: str) -> None:
    """Refuse weights without a config whose width is known to be published with heads wider than 64.

    The weights alone cannot tell 20 heads of 64 from 16 of 80, and the wrong one gives wrong numbers quietly.
    """
    conv = state_dict.get("visual.conv1.weight")
    if "visual.proj" in state_dict and conv is not None and conv.shape[0] in _WIDE_HEADS:
        raise CheckpointError(_other_head_width(source, f"{_WIDE_HEADS[conv.shape[0]]} (as published)"))


def _other_head_width(source: str, width: str) -> str:
    return f"{source} has attention heads of width {width}; those of openai/CLIP and of clipfast have 64"


def some(names: list[str], most: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
