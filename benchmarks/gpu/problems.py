"""Calls of the operators at CLIP's shapes, with random tensors made on the device, and the check of their results.

A problem is a case of tests/op_cases.py with its sizes counted. Large results are compared with float64 on samples
spread over the batch, by the rule of tests/accuracy.py, and all over with eager PyTorch, row by row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast import roofline, tuning
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload
from tests.accuracy import assert_accurate
from tests.op_cases import Case

SAMPLED_ROWS = 256
SAMPLED_SEQUENCES = 6
# greatest ||ours - eager|| / ||eager|| of a row: far above rounding, far below one wrong tile
ROW_GAPS = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
HALVES = (torch.float16, torch.bfloat16)


class Problem(NamedTuple):
    operator: str
    model: str
    shape: str
    batch: int
    dtype: torch.dtype
    works: list[roofline.Work]
    make: Callable[[], Case]  # another set of random tensors each time

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def title(self) -> str:
        return f"{self.operator} {self.model} {self.shape} {self.dtype_name}".replace("  ", " ")


_unfilled = False


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Inside, activations and weights hold no numbers: enough to see launches, at a third of the memory."""
    global _unfilled
    before, _unfilled = _unfilled, True
    try:
        yield
    finally:
        _unfilled = before


class Maker:
    """Random tensors on one device: activations and weights in one dtype, normalisations in float32.

    whole: those, positions and the scale in that dtype too, as `model.to(dtype)` leaves them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, whole: bool = False):
        self.device, self.dtype, self.whole = device, dtype, whole

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        if _unfilled:
            return torch.empty(shape, device=self.device, dtype=self.dtype)
        return (torch.randn(shape, device=self.device) * size).to(self.dtype)

    def affine(self, n_cols: int, n_terms: int) -> tuple[Tensor, Tensor]:
        return self.normal(n_cols, n_terms, size=n_terms**-0.5), self.normal(n_cols, size=0.3)

    def norm(self, width: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, width, device=self.device) * 0.3
        return self.wide(1 + noise[0]), self.wide(noise[1])

    def wide(self, x: Tensor) -> Tensor:
        """x, float32, as a model has what openai/CLIP does not round."""
        return x.to(self.dtype) if self.whole else x


def _offsets(lengths: Sequence[int]) -> list[int]:
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets


def layer_norm(model: str, rows: int, width: int, batch: int, m: Maker, *, residual: bool = False) -> Problem:
    def make() -> Case:
        options = {"residual": m.normal(rows, width)} if residual else {}
        return Case("layer_norm", (m.normal(rows, width), *m.norm(width)), options)

    works = roofline.layer_norm(rows, width, m.dtype.itemsize, residual=residual)
    return Problem("layer_norm", model, f"{rows}x{width}" + "+res" * residual, batch, m.dtype, works, make)


def linear(
    model: str, rows: int, n_cols: int, n_terms: int, batch: int, m: Maker, activation: str | None, residual: bool
) -> Problem:
    def make() -> Case:
        options: dict[str, Any] = {"activation": activation} if activation else {}
        options |= {"residual": m.normal(rows, n_cols)} if residual else {}
        return Case("linear", (m.normal(rows, n_terms), *m.affine(n_cols, n_terms)), options)

    shape = f"{rows}x{n_terms}->{n_cols}" + (f" {activation}" if activation else "") + "+res" * residual
    works = roofline.linear(rows, n_cols, n_terms, m.dtype.itemsize, residual=residual)
    return Problem("linear", model, shape, batch, m.dtype, works, make)


def mlp(model: str, rows: int, width: int, batch: int, m: Maker) -> Problem:
    def make() -> Case:
        weights = (*m.affine(4 * width, width), *m.affine(width, 4 * width))
        return Case("mlp", (m.normal(rows, width), *m.norm(width), *weights))

    works = roofline.mlp(rows, width, 4 * width, m.dtype.itemsize)
    return Problem("mlp", model, f"{rows}x{width}", batch, m.dtype, works, make)


def attention(
    model: str, lengths: Sequence[int], heads: int, m: Maker, *, causal: bool, head_width: int = 64
) -> Problem:
    def make() -> Case:
        return Case("attention", (m.normal(sum(lengths), 3, heads, head_width), _offsets(lengths)), {"causal": causal})

    same = len(set(lengths)) == 1
    shape = f"L={lengths[0]}" if same else f"L<={max(lengths)}, mean {sum(lengths) / len(lengths):.3g}"
    wide = "" if head_width == 64 else f" of {head_width}"
    shape = f"{len(lengths)}x{heads} heads{wide} {shape}" + " causal" * causal
    works = roofline.attention(lengths, head_width * heads, m.dtype.itemsize, causal=causal)
    return Problem("attention", model, shape, len(lengths), m.dtype, works, make)


def attention_pool(model: str, lengths: Sequence[int], width: int, m: Maker) -> Problem:
    def make() -> Case:
        projections = [x for _ in range(3) for x in m.affine(width, width)]
        arguments = (m.normal(len(lengths), width), m.normal(sum(lengths), width), _offsets(lengths), *projections)
        return Case("attention_pool", arguments, {"heads": width // 64})

    works = roofline.attention_pool(lengths, width, width // 64, m.dtype.itemsize)
    shape = f"{len(lengths)} of {sum(lengths)} rows x{width}"
    return Problem("attention_pool", model, shape, len(lengths), m.dtype, works, make)


def patch_embed(
    model: str,
    batch: int,
    size: tuple[int, int],
    patch: int,
    width: int,
    m: Maker,
    *,
    uint8: bool = False,
    norm: bool = True,
) -> Problem:
    patches = (size[0] // patch) * (size[1] // patch)

    def make() -> Case:
        images = m.normal(batch, 3, *size)
        options: dict[str, Any] = dict(zip(("norm_weight", "norm_bias"), m.norm(width), strict=True)) if norm else {}
        if uint8:
            images = torch.randint(0, 256, images.shape, dtype=torch.uint8, device=m.device)
            options |= {"mean": torch.full((3,), 0.45, device=m.device), "std": torch.full((3,), 0.27, device=m.device)}
        weight = m.normal(width, 3, patch, patch, size=(3 * patch**2) ** -0.5)
        positions = m.wide(torch.randn(1 + patches, width, device=m.device))
        return Case("patch_embed", (images, weight, m.norm(width)[1], positions), options)

    works = roofline.patch_embed(batch, patches, patch, width, 1 if uint8 else m.dtype.itemsize, m.dtype.itemsize)
    shape = f"{batch}x3x{size[0]}x{size[1]} P={patch}" + " uint8" * uint8 + " ln" * norm
    return Problem("patch_embed", model, shape, batch, m.dtype, works, make)


def project(model: str, rows: int, width: int, embed_dim: int, m: Maker) -> Problem:
    def make() -> Case:
        return Case("project", (m.normal(rows, width), *m.norm(width), m.normal(width, embed_dim, size=width**-0.5)))

    works = roofline.project(rows, width, embed_dim, m.dtype.itemsize)
    return Problem("project", model, f"{rows}x{width}->{embed_dim}", rows, m.dtype, works, make)


def logits(model: str, n_images: int, n_texts: int, width: int, m: Maker) -> Problem:
    def make() -> Case:
        scale = m.wide(torch.tensor(4.6, device=m.device))
        return Case("logits", (m.normal(n_images, width, size=3), m.normal(n_texts, width, size=0.1), scale))

    works = roofline.logits(n_images, n_texts, width, m.dtype.itemsize)
    return Problem("logits", model, f"{n_images}x{n_texts}x{width}", n_images, m.dtype, works, make)


# ---------------------------------------------------------------------------------------------------------------------
# The problems of one tower


def products(width: int) -> tuple[tuple[int, int, str | None, bool], ...]:
    """(N, K, activation, residual) of a block's products."""
    return (
        (4 * width, width, "quick_gelu", False),
        (width, 4 * width, None, True),
        (3 * width, width, None, False),
        (width, width, None, True),
    )


def of_block(model: str, lengths: Sequence[int], width: int, m: Maker, *, causal: bool) -> Iterator[Problem]:
    """The operators of a residual block on these sequences, those that take most of its time first."""
    rows, batch = sum(lengths), len(lengths)
    fc1, *others = products(width)
    yield linear(model, rows, *fc1[:2], batch, m, *fc1[2:])
    yield attention(model, lengths, width // 64, m, causal=causal)
    for n_cols, n_terms, activation, residual in others:
        yield linear(model, rows, n_cols, n_terms, batch, m, activation, residual)
    yield layer_norm(model, rows, width, batch, m)
    yield attention_pool(model, lengths, width, m)


def of_last_block(model: str, batch: int, tower: str, m: Maker) -> Iterator[Problem]:
    """What follows the pooled rows, one a sample: few rows, and so other launches than a block's."""
    width = ARCHITECTURES[model]["vision_width" if tower == "image" else "transformer_width"]
    for n_cols, n_terms, activation, residual in products(width):
        yield linear(model, batch, n_cols, n_terms, batch, m, activation, residual)
    yield layer_norm(model, batch, width, batch, m)


def of_images(model: str, batch: int, m: Maker) -> Iterator[Problem]:
    sizes = ARCHITECTURES[model]
    width, patch, side = sizes["vision_width"], sizes["vision_patch_size"], sizes["image_resolution"]
    yield from of_block(model, [1 + (side // patch) ** 2] * batch, width, m, causal=False)
    for uint8 in (False, True):
        yield patch_embed(model, batch, (side, side), patch, width, m, uint8=uint8)
    yield project(model, batch, width, sizes["embed_dim"], m)


def of_texts(model: str, captions: workload.Captions, batch: int, m: Maker) -> Iterator[Problem]:
    sizes = ARCHITECTURES[model]
    yield from of_block(model, caption_lengths(captions, batch), sizes["transformer_width"], m, causal=True)


def caption_lengths(captions: workload.Captions, batch: int) -> list[int]:
    """Even over the range and ascending, as packing sorts them."""
    span = captions.longest - captions.shortest + 1
    return [captions.shortest + (2 * i + 1) * span // (2 * batch) for i in range(batch)]


# ---------------------------------------------------------------------------------------------------------------------
# Configurations of the products


WIDTHS = (512, 640, 768, 1024)
ROWS = (1, 8, 16, 17, 32, 33, 50, 64, 65, 77, 128, 200, 257, 400, 401, 1600, 6304, 12800, 50432, 65792)


def linear_configurations(dtype: torch.dtype, architecture: int) -> list[tuning.LinearConfig]:
    """All that tuning returns for CLIP's products on this GPU, and the cheaper tanh where it is accurate enough."""
    shapes = [(rows, n, k) for rows, width in itertools.product(ROWS, WIDTHS) for n, k, *_ in products(width)]
    found = dict.fromkeys(
        tuning.linear(*shape, dtype, architecture, described=described)
        for shape in shapes
        for described in (True, False)
    )
    # tanh.approx has 11 bits: enough for bfloat16
    cheaper = [dataclasses.replace(each, fast_tanh=True) for each in found] if dtype == torch.bfloat16 else []
    return [*found, *cheaper]


def run_linear(case: Case, config: tuning.LinearConfig | None) -> Tensor:
    from clipfast.kernels.linear import linear_fwd

    x, weight, bias = case.arguments
    return linear_fwd(
        x, weight, bias, case.options.get("residual"), case.options.get("activation") or "none", False, config
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks


class Sample(NamedTuple):
    case: Case  # the same call for a few samples of the batch
    rows: Tensor  # where their rows are in the whole output, [n] of [-1, columns]


def _spread(n: int, most: int, device: torch.device) -> Tensor:
    return torch.linspace(0, n - 1, min(n, most), device=device, dtype=torch.float64).round().long()


def sample(case: Case) -> Sample:
    """A few samples, first and last among them, spread over the batch."""
    first, *rest = case.arguments
    options = dict(case.options)
    if case.operator in ("attention", "attention_pool"):
        offsets = rest[0] if case.operator == "attention" else rest[1]
        chosen = _spread(len(offsets) - 1, SAMPLED_SEQUENCES, first.device)
        spans = [(offsets[i], offsets[i + 1]) for i in chosen.tolist()]
        rows = torch.cat([torch.arange(*span, device=first.device) for span in spans])
        few = _offsets([stop - start for start, stop in spans])
        if case.operator == "attention":
            return Sample(Case("attention", (first[rows], few), options), rows)
        return Sample(Case("attention_pool", (first[chosen], rest[0][rows], few, *rest[2:]), options), chosen)
    chosen = _spread(len(first), SAMPLED_SEQUENCES if case.operator == "patch_embed" else SAMPLED_ROWS, first.device)
    if options.get("residual") is not None:
        options["residual"] = options["residual"][chosen]
    rows = chosen
    if case.operator == "patch_embed":
        tokens = len(rest[2])
        rows = (chosen[:, None] * tokens + torch.arange(tokens, device=first.device)).flatten()
    return Sample(Case(case.operator, (first[chosen], *rest), options), rows)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def flat(output: Tensor) -> Tensor:
    return output.flatten(0, -2)


def n_terms(case: Case) -> int:
    """How many numbers a result of a product is the sum of, one product after the other; 0 of what is no product."""
    first, *rest = case.arguments
    counts: dict[str, Callable[[], int]] = {
        "linear": lambda: first.shape[1],
        "mlp": lambda: first.shape[1] + len(rest[2]),
        "project": lambda: first.shape[1],
        "logits": lambda: first.shape[1],
        "patch_embed": lambda: rest[0][0].numel(),
    }
    return counts.get(case.operator, lambda: 0)()


def check(output: Tensor, case: Case, eager: Tensor | None = None, *, strict: bool = True, what: str = "") -> float:
    """Compare an operator's (first) result with float64 on samples, and with all of eager's result if that is given.

    strict: at most twice the error of PyTorch's own composition, and one ulp, in float32 what so long a sum rounds to;
            else (for peers) eight times.
    Returns: the relative RMS error of the samples.
    Raises:  AssertionError with the figures.
    """
    few = sample(case)
    exact, peer = flat(few.case.exact()[0]), flat(few.case.peer()[0])
    found = flat(output)
    assert not found.isnan().any(), f"{what}: NaN in {int(found.isnan().any(-1).sum())} of {len(found)} rows"
    wanted = len(found) if eager is None else len(flat(eager))
    assert few.rows.max() < len(found) == wanted, f"{what}: {len(found)} rows"
    ours = found[few.rows]
    assert ours.shape == exact.shape, f"{what}: {list(ours.shape)} where {list(exact.shape)} is right"
    error = ((ours.double() - exact).norm() / exact.norm()).item()
    if strict:
        assert_accurate(ours, peer, exact, what=what, terms=n_terms(case))
    else:
        peers = ((peer.double() - exact).norm() / exact.norm()).item()
        bound = 8 * peers + torch.finfo(ours.dtype).eps
        assert error <= bound, f"{what}: relative RMS error {error:.2g} > {bound:.2g}"
    if eager is not None:
        theirs = flat(eager).float()
        gap = ((found.float() - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-6)).max().item()
        bound = ROW_GAPS[found.dtype]
        assert gap <= bound, f"{what}: a row is {gap:.2g} of its length away from eager PyTorch's, bound {bound:.2g}"
    return error
