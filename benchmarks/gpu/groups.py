"""Which towers are compared, in what order, and how long it takes: no GPU is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload

SHORT, WHOLE = workload.Captions(8, 24), workload.Captions(77, 77)
BATCHES = (256, 1, 32, 1024)
# at most, at least, and the seconds after which no further round starts
ROUNDS = {1: 41, 32: 21, 256: 15, 1024: 7}
LEAST_ROUNDS, ROUNDS_SECONDS = 5, 2.0
# torch.compile records its CUDA graph in the second call and replays it from the third
COMPILER_WARMUP = 2

# of a dry run, and of the check of graphs
TINY = {
    **ARCHITECTURES["ViT-B/32"],
    **{"embed_dim": 64, "image_resolution": 64, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 16},
    **{"vocab_size": 999, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2},
}


class Group(NamedTuple):
    """What is compared: everything that its rows share."""

    model: str
    tower: str  # image, text or train
    batch: int
    dtype: torch.dtype
    captions: workload.Captions = WHOLE
    compiled: bool = False  # with torch.compile, which takes minutes

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def operator(self) -> str:
        return "train_step" if self.tower == "train" else f"encode_{self.tower}"

    @property
    def about(self) -> str:
        return "" if self.tower == "image" else str(self.captions)

    @property
    def rounds(self) -> int:
        return ROUNDS.get(self.batch, 2)

    @property
    def warmup(self) -> int:
        """Rounds besides the check, which is one as well."""
        return 0 if self.batch == 1024 else 1

    def title(self) -> str:
        tower = "train step" if self.tower == "train" else self.tower
        captions = f" of {self.captions} tokens" if self.about else ""
        compiled = ", torch.compile" if self.compiled else ""
        return f"{self.model} {tower}{captions}, batch {self.batch}, {self.dtype_name}{compiled}"


B32, L14 = "ViT-B/32", "ViT-L/14"
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
# the last of each stage has what time the first leaves
COMPILED = {
    "compiled-image": [Group(B32, "image", batch, BFLOAT16, compiled=True) for batch in (256, 1)],
    "compiled-text": [Group(B32, "text", batch, BFLOAT16, SHORT, compiled=True) for batch in (256, 1)],
    "compiled-l14": [Group(L14, "image", batch, BFLOAT16, compiled=True) for batch in (256, 1)],
}
TRAIN = Group(B32, "train", 256, BFLOAT16, SHORT)


def plan() -> list[Group]:
    """Without compilers, most important first; those of one model and dtype follow each other and share its models."""
    found = []
    for dtype in (BFLOAT16, FLOAT16):
        for batch in BATCHES:
            found += [Group(B32, "image", batch, dtype), Group(B32, "text", batch, dtype, SHORT)]
        found.append(Group(B32, "text", 256, dtype, WHOLE))
    for dtype in (BFLOAT16, FLOAT16):
        found += [Group(L14, "image", batch, dtype) for batch in BATCHES[:-1]]
        found.append(Group(L14, "text", 256, dtype, SHORT))
    return found


def more() -> list[Group]:
    """What takes longer or says less, behind the plan in the same order: its last models are the first here."""
    found = [Group(L14, "image", 1024, dtype) for dtype in (FLOAT16, BFLOAT16)]
    for dtype in (BFLOAT16, FLOAT16):
        found += [Group(B32, "text", batch, dtype, WHOLE) for batch in BATCHES if batch != 256]
    return found


def towers() -> Iterator[tuple[str, str, int, workload.Captions]]:
    """(tower, model, batch, captions) of all that is timed without compilers, in any dtype."""
    asked = ((group.tower, group.model, group.batch, group.captions) for group in (*plan(), *more()))
    return iter(dict.fromkeys(asked))


def tiny() -> list[Group]:
    """Of a dry run."""
    half = Group("tiny", "image", 3, BFLOAT16)
    return [
        Group("tiny", "image", 2, torch.float32),
        Group("tiny", "text", 2, torch.float32, SHORT),
        half,
        half._replace(tower="text"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Time on an H100, from benchmarks/results/h100-80gb-hbm3-2026-11-28.csv, _graphs.csv and the clock in _compiled.txt


# seconds of one call of ours, openai-clip, open_clip and transformers (text: padded in both ways) together: the greater
# sum of medians of the two files and both dtypes
ROUND_SECONDS = {
    (B32, "image"): {1: 0.027, 32: 0.024, 256: 0.057, 1024: 0.152},
    (B32, "text"): {1: 0.024, 32: 0.033, 256: 0.065},
    (L14, "image"): {1: 0.059, 32: 0.066, 256: 0.503},
    (L14, "text"): {256: 0.072},
}
# for another card, and for text of 77 tokens, which was not timed
SLACK = 1.25
# of a group besides its calls: inputs, float64 of its samples, a graph recorded, kernels fetched from Triton's cache
# (compiled before: a launch that is not there costs a second)
GROUP_SECONDS = 0.8
# CUDA begun and libraries imported, PyTorch's apart, which is there in a fork; a guess
STARTING = 6.0
# drawing a model's weights on one core (3.6 and 5.4 s were measured on an AMD EPYC), and everybody's models on the GPU.
# _compiled.txt, lines at 109 and 141 s: ViT-L/14's image at 256 took 32 s, 13.5 of them calls; the rest was this, with
# 6 models by way of the host, and Triton's compilations
WEIGHTS = {B32: 4.0, L14: 7.0}
MODELS = {B32: 2.0, L14: 4.0}
# max-autotune. _compiled.txt, line at 109 s: ViT-B/32's text at 256 took 108 s, of which libraries, weights, 7 other
# contestants and Triton's compilations by estimate took 28. The image, 24 blocks and a batch of 1 are guesses.
COMPILE_SECONDS = {(B32, 256): 80.0, (B32, 1): 60.0, (L14, 256): 110.0, (L14, 1): 90.0}
# 15 rounds of three steps of about three forwards of both towers (0.1 s), the float64 gradients, the models, and thirty
# backward kernels compiled; none of it was timed
TRAIN_SECONDS = 50.0


def estimate(group: Group) -> float:
    """Seconds on an H100, without the weights and models that its neighbours share."""
    if group.tower == "train":
        return TRAIN_SECONDS
    known = ROUND_SECONDS.get((group.model, group.tower), {group.batch: 0.0})
    nearest = max(batch for batch in known if batch <= group.batch)
    one = SLACK * known[nearest] * group.batch / nearest
    rounds = min(group.rounds, max(LEAST_ROUNDS, ROUNDS_SECONDS / one if one else 0))
    calls = 1 + group.warmup + rounds + COMPILER_WARMUP * group.compiled
    compiling = COMPILE_SECONDS.get((group.model, group.batch), 0.0) if group.compiled else 0.0
    return GROUP_SECONDS + calls * one + compiling


def building(model: str, *, drawn: bool = False) -> float:
    """Seconds of everybody's models in one dtype, and of the weights unless they are drawn already."""
    return MODELS.get(model, 0.0) + (0.0 if drawn else WEIGHTS.get(model, 0.0))


def forecast(name: str) -> list[tuple[str, float]]:
    """(what, estimated seconds) of each part of a stage in order.

    name: "towers", "train" or one of COMPILED, of which all but the first group has what is left.
    """
    stages = {"towers": plan(), "train": [TRAIN], **{stage: groups[:1] for stage, groups in COMPILED.items()}}
    return [("start", STARTING), *_parts(stages[name])]


def _parts(groups: list[Group]) -> Iterator[tuple[str, float]]:
    before = None
    for (model, _), same in itertools.groupby(groups, key=_shared):
        several = list(same)
        if several[0].tower != "train":  # counted in its own
            yield (
                f"{model} {several[0].dtype_name}: weights, models",
                building(model, drawn=before == model),
            )
        yield from ((group.title(), estimate(group)) for group in several)
        before = model


def _shared(group: Group) -> tuple[str, torch.dtype]:
    return group.model, group.dtype
