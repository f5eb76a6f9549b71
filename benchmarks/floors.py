"""The least a GPU has to do: floating-point operations and bytes of device memory of each operator and tower.

A launch reads each of its inputs once and writes each of its outputs once; operations are those of matrix products, a
multiplication and an addition counting as two. Time cannot be less than the larger of operations over the rate of the
tensor cores and bytes over the memory's bandwidth, launch by launch. Pure functions of sizes: nothing here measures.

`itemsize` is in bytes, of the tensors; `rows`, `lengths` are rows of the packed tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Work(NamedTuple):
    """One launch."""

    flops: int
    bytes: int


def seconds(works: Iterable[Work], flops_per_s: float, bytes_per_s: float) -> float:
    """The time below which these launches, one after another, cannot run."""
    return sum(max(work.flops / flops_per_s, work.bytes / bytes_per_s) for work in works)


def total(works: Iterable[Work]) -> Work:
    works = list(works)
    return Work(sum(work.flops for work in works), sum(work.bytes for work in works))


def layer_norm(rows: int, width: int, itemsize: int, *, residual: bool = False) -> list[Work]:
    """With a residual, that is read too and the sum written."""
    return [Work(0, rows * width * itemsize * (4 if residual else 2) + 2 * width * itemsize)]


def linear(rows: int, n_cols: int, n_terms: int, itemsize: int, *, residual: bool = False) -> list[Work]:
    elements = rows * n_terms + n_cols * n_terms + n_cols + rows * n_cols * (2 if residual else 1)
    return [Work(2 * rows * n_cols * n_terms, elements * itemsize)]


def mlp(rows: int, width: int, hidden: int, itemsize: int) -> list[Work]:
    """Two products; the LayerNorm before them can be folded into the first, and counts nothing."""
    first, second = linear(rows, hidden, width, itemsize), linear(rows, width, hidden, itemsize, residual=True)
    return first + second


def attention(lengths: Sequence[int], width: int, itemsize: int, *, causal: bool, dense: bool = False) -> list[Work]:
    """width: of all heads together.   dense: count the scores that a causal mask hides, as PyTorch's counter does."""
    if causal and not dense:
        flops = sum(2 * length * (length + 1) * width for length in lengths)
    else:
        flops = sum(4 * length**2 * width for length in lengths)
    return [Work(flops, 4 * sum(lengths) * width * itemsize)]


def attention_pool(lengths: Sequence[int], width: int, heads: int, itemsize: int) -> list[Work]:
    """One query per sequence; keys and values are formed only where (Wk^T q).y and Wv (sum p y) would take more."""
    together = sum(6 * width**2 + 4 * heads * length * width for length in lengths)
    apart = sum(2 * width**2 * (1 + 2 * length) + 4 * length * width for length in lengths)
    elements = sum(lengths) * width + 2 * len(lengths) * width + 3 * width**2
    return [Work(min(together, apart), elements * itemsize)]


def patch_embed(batch: int, patches: int, patch: int, width: int, pixel_size: int, itemsize: int) -> list[Work]:
    """ln_pre, if any, is fused.   pixel_size: bytes of one channel of a pixel."""
    pixels = 3 * patch**2
    elements = pixels * width + (1 + patches) * width * (1 + batch)
    return [Work(2 * batch * patches * pixels * width, batch * patches * pixels * pixel_size + elements * itemsize)]


def project(rows: int, width: int, embed_dim: int, itemsize: int) -> list[Work]:
    return linear(rows, embed_dim, width, itemsize)


def logits(n_images: int, n_texts: int, width: int, itemsize: int) -> list[Work]:
    elements = (n_images + n_texts) * width + n_images * n_texts
    return [Work(2 * n_images * n_texts * width, elements * itemsize)]


def blocks(
    lengths: Sequence[int], width: int, layers: int, itemsize: int, *, causal: bool, dense: bool = False
) -> list[Work]:
    """The residual blocks of a transformer: five launches each, every LayerNorm folded.

    Of the last block only one row a sequence is read, so that only keys, values and that row are counted.
    dense: all rows of every block, and all scores.
    """
    rows, count = sum(lengths), len(lengths)
    block = [
        *linear(rows, 3 * width, width, itemsize),
        *attention(lengths, width, itemsize, causal=causal, dense=dense),
        *linear(rows, width, width, itemsize, residual=True),
        *mlp(rows, width, 4 * width, itemsize),
    ]
    if dense:
        return block * layers
    last = [
        *attention_pool(lengths, width, max(1, width // 64), itemsize),
        *linear(count, width, width, itemsize, residual=True),
        *mlp(count, width, 4 * width, itemsize),
    ]
    return block * (layers - 1) + last


def image_tower(
    architecture: Mapping[str, Any], batch: int, itemsize: int, *, pixel_size: int | None = None, dense: bool = False
) -> list[Work]:
    """encode_image of a vision transformer; `architecture` as in `benchmarks.workload`."""
    width, patch = architecture["vision_width"], architecture["vision_patch_size"]
    patches = (architecture["image_resolution"] // patch) ** 2
    lengths = [1 + patches] * batch
    return [
        *patch_embed(batch, patches, patch, width, pixel_size or itemsize, itemsize),
        *blocks(lengths, width, architecture["vision_layers"], itemsize, causal=False, dense=dense),
        *project(batch, width, architecture["embed_dim"], itemsize),
    ]


def text_tower(
    architecture: Mapping[str, Any], lengths: Sequence[int], itemsize: int, *, dense: bool = False
) -> list[Work]:
    """encode_text of captions of these lengths, nothing after their end-of-text token computed.

    dense: as openai/CLIP, the whole context of each.
    """
    width, context = architecture["transformer_width"], architecture["context_length"]
    if dense:
        lengths = [context] * len(lengths)
    # one row of the embedding table a token, and of the positions
    embedding = Work(0, (2 * sum(lengths) + context) * width * itemsize)
    return [
        embedding,
        *blocks(lengths, width, architecture["transformer_layers"], itemsize, causal=True, dense=dense),
        *project(len(lengths), width, architecture["embed_dim"], itemsize),
    ]
