"""What is computed: the published architectures, seeded weights and inputs, the exact answer.

Nothing is downloaded: sizes are those of the published models, weights are random. The speed of a dense product does
not depend on the numbers in it, and every contestant is checked on the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast import reference
from clipfast.architectures import VOCABULARY
from clipfast.model import CLIP
from clipfast.tokenizer import tokenize

TOWERS = ("image", "text")
# samples of a batch that are compared with the reference, spread evenly over it; float64 takes seconds for each dozen
CHECKED = 32
# of them at a time, in float64: more are no faster, and take gigabytes
AT_ONCE = 8


class Captions(NamedTuple):
    """Shortest and longest caption in tokens, start and end of text included; lengths are uniform between."""

    shortest: int
    longest: int

    @staticmethod
    def parse(text: str) -> Captions:
        """From "8-24" or "77". Raises ValueError for anything else."""
        first, _, last = text.partition("-")
        captions = Captions(int(first), int(last or first))
        if not 2 <= captions.shortest <= captions.longest:
            raise ValueError(f"captions: expected 2 <= shortest <= longest, got {text!r}")
        return captions

    def __str__(self) -> str:
        return str(self.longest) if self.shortest == self.longest else f"{self.shortest}-{self.longest}"

    def ids(self, architecture: Mapping[str, Any], batch: int, seed: int) -> Tensor:
        """[batch, context] int64, random ids between start and end of text (the two greatest), zero padded.

        The lengths are even over the range. Raises ValueError if one is longer than the context.
        """
        context, end = architecture["context_length"], architecture["vocab_size"] - 1
        if self.longest > context:
            raise ValueError(f"captions: at most {context} tokens, got {self}")
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(1, end - 1, (batch, context), generator=generator)
        # spread evenly, then shuffled: drawn ones would have another mean in every small batch
        steps = (torch.arange(batch) * 2 + 1) * (self.longest - self.shortest + 1) // (2 * batch)
        last = (self.shortest + steps - 1)[torch.randperm(batch, generator=generator), None]
        column = torch.arange(context)
        text[:, 0] = end - 1
        return torch.where(column < last, text, torch.where(column == last, end, 0))


class CaptionFile:
    """A user's own captions, one a line, tokenised; a batch takes as many of them, spread over the file."""

    def __init__(self, path: Path):
        """Raises ValueError naming the file, and the line where there is one, for what cannot be used."""
        self.name = path.name
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or f"not UTF-8 text: {error}"
            raise ValueError(f"captions: {path}: {why}") from error
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows += [tokenize(line)] if line else []
            except RuntimeError as error:
                raise ValueError(f"captions: {path}, line {number}: {error}") from error
        if not rows:
            raise ValueError(f"captions: {path} has no line of text")
        self._ids = torch.cat(rows).long()

    def __str__(self) -> str:
        return f"file {self.name}"

    def ids(self, architecture: Mapping[str, Any], batch: int, seed: int) -> Tensor:
        """[batch, 77] int64; a file with fewer lines is used again from the start."""
        if (architecture["vocab_size"], architecture["context_length"]) != (VOCABULARY, self._ids.shape[1]):
            raise ValueError(f"captions: {self} is tokenised for {VOCABULARY} ids and {self._ids.shape[1]} columns")
        count = len(self._ids)
        chosen = torch.arange(batch) % count if batch >= count else torch.arange(batch) * count // batch
        return self._ids[chosen]


def random_weights(architecture: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A float32 state dict of this architecture in which every parameter and statistic has its own value.

    Matrices keep the size of what passes through them (standard deviation fan_in ** -0.5), so that depth neither
    drowns nor blows up the signal; biases and normalisations are random too, since zeros and ones hide mistakes.
    """
    with torch.device("meta"):
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in CLIP(**architecture).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (shape, dtype) in shapes.items():
        if name == "logit_scale" or not dtype.is_floating_point:
            weights[name] = torch.full(shape, 4.6 if dtype.is_floating_point else 0, dtype=dtype)
            continue
        noise = torch.randn(shape, generator=generator)
        if "embedding" in name:
            weights[name] = 0.02 * noise
        elif name.endswith("running_var"):
            weights[name] = 1 + 0.2 * noise.abs()
        elif len(shape) > 1:
            # projections are stored [in, out], everything else [out, in, ...]
            fan_in = shape[0] if name in ("text_projection", "visual.proj") else shape[1:].numel()
            weights[name] = noise * fan_in**-0.5
        elif name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = 0.1 * noise
    return weights


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The numbers that openai/CLIP's `convert_weights` leaves of the weights in this dtype, written as float32.

    Normalisations, embeddings and logit_scale are not rounded.
    """
    kept = ("ln_", "bn", "downsample.1", "embedding", "logit_scale")
    return {n: w if any(part in n for part in kept) else w.to(dtype).to(w.dtype) for n, w in weights.items()}


def inputs(
    architecture: Mapping[str, Any], batch: int, captions: Captions | CaptionFile, seed: int = 1
) -> dict[str, Tensor]:
    """Both towers' inputs.

    Returns: "image": [B, 3, R, R] float32, standard normal; image i is the same in a batch of any size.
             "text": [B, context] int64.
    Raises:  ValueError if the captions do not fit the architecture.
    """
    resolution = architecture["image_resolution"]
    images = torch.empty(batch, 3, resolution, resolution)
    for i, image in enumerate(images):
        image.normal_(generator=torch.Generator().manual_seed(1000 * seed + i))
    return {"image": images, "text": captions.ids(architecture, batch, seed)}


def checked_samples(batch: int, most: int = CHECKED) -> Tensor:
    """Indices of the samples that are compared with the reference, int64."""
    return torch.linspace(0, batch - 1, min(batch, most)).round().long()


def exact(tower: str, weights: Mapping[str, Tensor], data: Tensor, dtype: torch.dtype) -> Tensor:
    """What a perfect computer would return for this data: float64 on weights and images rounded to dtype."""
    own = {name: weight for name, weight in weights.items() if name.startswith("visual.") == (tower == "image")}
    double = {name: weight.double() for name, weight in rounded(own, dtype).items()}
    encode = reference.encode_image if tower == "image" else reference.encode_text
    data = data.to(dtype) if tower == "image" else data
    return torch.cat([encode(double, rows) for rows in data.split(AT_ONCE)])


def exact_logits(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """[I, T] float64 of exact embeddings."""
    return reference.logits(images, texts, logit_scale.double())[0]
