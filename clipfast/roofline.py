"""The least a machine has to do: floating-point operations and bytes of memory of each operator, tower and train step.

A launch reads each of its inputs once and writes each of its outputs once; operations are those of matrix products and
convolutions, a multiplication and an addition counting as two. Time cannot be less than the larger of operations over
the best rate of multiply-adds and bytes over the memory's bandwidth: on a GPU launch by launch (`seconds`), on a CPU of
all launches together, and of the bytes those that no cache keeps (`whole`). Pure functions of sizes:
nothing here measures, and nothing but the standard library is imported.

`itemsize` is in bytes, of the tensors; `rows`, `lengths` are rows of the packed tensors; `architecture` is a mapping of
the constructor arguments of `clipfast.CLIP`. With `dense` a function counts what openai/CLIP computes: every row of
every block, every score, the whole context of a text. That count is the one `torch.utils.flop_counter` gives for
openai/CLIP; without it, what nobody reads is left out.
Source: Williams et al. 2009, Roofline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Work(NamedTuple):
    """One launch: floating-point operations, bytes read, bytes written.

    weights: of the bytes read, those of parameters, which come from memory unless a cache kept them from the last call.
    updated: of the bytes read and written, an optimiser's: parameters, gradients and moments.
    """

    flops: int
    read: int
    written: int
    weights: int = 0
    updated: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


def seconds(works: Iterable[Work], flops_per_s: float, bytes_per_s: float, read_per_s: float | None = None) -> float:
    """The time below which these launches, one after another, cannot run.

    read_per_s: of weights, which are only read, where that was measured.
    """
    return sum(max(work.flops / flops_per_s, memory_seconds(work, bytes_per_s, read_per_s)) for work in works)


def memory_seconds(work: Work, bytes_per_s: float, read_per_s: float | None = None) -> float:
    """Of its bytes, weights at `read_per_s` if that was measured."""
    return (work.bytes - work.weights) / bytes_per_s + work.weights / (read_per_s or bytes_per_s)


def whole(works: Iterable[Work], flops_per_s: float, read_per_s: float, copy_per_s: float, cached: int = 0) -> float:
    """The time below which a CPU cannot run these launches, in whatever order or all at once.

    A CPU fetches the next weights while it multiplies, and what one launch hands to the next need not leave its caches.
    So only operations count, and bytes that come from memory: weights, read at `read_per_s`, and what an optimiser
    reads and writes, at `copy_per_s`; of both, `cached` bytes may have stayed in the caches.
    """
    sums = total(works)
    memory = max(0, sums.weights - cached) / read_per_s + max(0, sums.updated - cached) / copy_per_s
    return max(sums.flops / flops_per_s, memory)


def total(works: Iterable[Work]) -> Work:
    """All launches as if they were one."""
    works = list(works)
    return Work(*(sum(getattr(work, name) for work in works) for name in Work._fields))


def backward(work: Work, *, inputs: bool = True) -> Work:
    """The gradients of one launch: it reads what the launch read and the gradient of what that wrote.

    Weights are not counted as such again: what the forward read last may still be in a cache.
    inputs: False where only the weights want a gradient: the first product of a tower.
    """
    # of a product y = x w: dx = dy w and dw = x dy, each as long as the product itself
    return Work(work.flops * (2 if inputs else 1), work.read + work.written, work.read)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def layer_norm(rows: int, width: int, itemsize: int, *, residual: bool = False) -> list[Work]:
    """With a residual, that is read too and the sum written."""
    passes = 2 if residual else 1
    weights = 2 * width * itemsize
    return [Work(0, passes * rows * width * itemsize + weights, passes * rows * width * itemsize, weights)]


def linear(rows: int, n_cols: int, n_terms: int, itemsize: int, *, residual: bool = False) -> list[Work]:
    """x [rows, n_terms] times a weight [n_cols, n_terms], with bias, activation and residual in the same launch."""
    weights = n_cols * n_terms + n_cols
    read = rows * n_terms + weights + (rows * n_cols if residual else 0)
    return [Work(2 * rows * n_cols * n_terms, read * itemsize, rows * n_cols * itemsize, weights * itemsize)]


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
    elements = sum(lengths) * width
    return [Work(flops, 3 * elements * itemsize, elements * itemsize)]


def attention_pool(lengths: Sequence[int], width: int, heads: int, itemsize: int) -> list[Work]:
    """One query per sequence; keys and values are formed only where (Wk^T q).y and Wv (sum p y) would take more."""
    together = sum(6 * width**2 + 4 * heads * length * width for length in lengths)
    apart = sum(2 * width**2 * (1 + 2 * length) + 4 * length * width for length in lengths)
    weights = 3 * width**2
    read = sum(lengths) * width + len(lengths) * width + weights
    return [Work(min(together, apart), read * itemsize, len(lengths) * width * itemsize, weights * itemsize)]


def patch_embed(batch: int, patches: int, patch: int, width: int, pixel_size: int, itemsize: int) -> list[Work]:
    """ln_pre, if any, is fused.   pixel_size: bytes of one channel of a pixel."""
    pixels = 3 * patch**2
    weights = (pixels + 1 + patches) * width * itemsize
    read = batch * patches * pixels * pixel_size + weights
    return [Work(2 * batch * patches * pixels * width, read, (1 + patches) * width * batch * itemsize, weights)]


def project(rows: int, width: int, embed_dim: int, itemsize: int) -> list[Work]:
    """LayerNorm and projection of the pooled rows."""
    return linear(rows, embed_dim, width, itemsize)


def logits(n_images: int, n_texts: int, width: int, itemsize: int) -> list[Work]:
    """Cosines of all pairs, scaled: one [n_images, n_texts]; the other is its transpose."""
    read = (n_images + n_texts) * width * itemsize
    return [Work(2 * n_images * n_texts * width, read, n_images * n_texts * itemsize)]


def convolution(
    batch: int, side: int, channels_in: int, channels_out: int, kernel: int, itemsize: int, stride: int = 1
) -> list[Work]:
    """side: of the square output.   BatchNorm and ReLU are fused."""
    weights = channels_in * channels_out * kernel**2
    read = batch * (side * stride) ** 2 * channels_in + weights
    written = batch * side**2 * channels_out
    return [Work(2 * written * channels_in * kernel**2, read * itemsize, written * itemsize, weights * itemsize)]


# ---------------------------------------------------------------------------------------------------------------------
# Towers


def blocks(
    lengths: Sequence[int], width: int, layers: int, itemsize: int, *, causal: bool, dense: bool = False
) -> list[Work]:
    """The residual blocks of a transformer: five launches each, every LayerNorm folded.

    Of the last block only one row a sequence is read, so that only keys, values and that row are counted.
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
    """encode_image; the first launch reads the pixels.   pixel_size: bytes of one channel of a pixel."""
    if architecture["vision_patch_size"] is None:
        return _resnet(architecture, batch, itemsize, dense=dense)
    width, patch = architecture["vision_width"], architecture["vision_patch_size"]
    patches = (architecture["image_resolution"] // patch) ** 2
    lengths = [1 + patches] * batch
    return [
        *patch_embed(batch, patches, patch, width, pixel_size or itemsize, itemsize),
        *blocks(lengths, width, architecture["vision_layers"], itemsize, causal=False, dense=dense),
        *project(batch, width, architecture["embed_dim"], itemsize),
    ]


def _resnet(architecture: Mapping[str, Any], batch: int, itemsize: int, *, dense: bool) -> list[Work]:
    def add(side: int, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        works.extend(convolution(batch, side, channels_in, channels_out, kernel, itemsize, stride))

    works: list[Work] = []
    width, side = architecture["vision_width"], architecture["image_resolution"] // 2
    add(side, 3, width // 2, 3, stride=2)
    add(side, width // 2, width // 2, 3)
    add(side, width // 2, width, 3)
    side, channels = side // 2, width
    for layer, depth in enumerate(architecture["vision_layers"]):
        planes = width << layer
        for block in range(depth):
            # an average pool before the last convolution strides the first block of layers 2 to 4
            after = side // 2 if layer and not block else side
            add(side, channels, planes, 1)
            add(side, planes, planes, 3)
            add(after, planes, 4 * planes, 1)
            if block == 0:
                add(after, channels, 4 * planes, 1)
            side, channels = after, 4 * planes
    lengths, embed_dim = [side**2 + 1] * batch, architecture["embed_dim"]
    if not dense:
        pool = attention_pool(lengths, channels, max(1, channels // 64), itemsize)
        return works + pool + linear(batch, embed_dim, channels, itemsize)
    # openai/CLIP's pool asks with every position, and keeps the first answer
    rows = sum(lengths)
    pool = [*linear(rows, 3 * channels, channels, itemsize), *attention(lengths, channels, itemsize, causal=False)]
    return works + pool + linear(rows, embed_dim, channels, itemsize)


def text_tower(
    architecture: Mapping[str, Any], lengths: Sequence[int], itemsize: int, *, dense: bool = False
) -> list[Work]:
    """encode_text of captions of these lengths, nothing after their end-of-text token computed."""
    width, context = architecture["transformer_width"], architecture["context_length"]
    if dense:
        lengths = [context] * len(lengths)
    # one row of the embedding table a token, and of the positions
    embedding = Work(0, (sum(lengths) + context) * width * itemsize, sum(lengths) * width * itemsize)
    return [
        embedding,
        *blocks(lengths, width, architecture["transformer_layers"], itemsize, causal=True, dense=dense),
        *project(len(lengths), width, architecture["embed_dim"], itemsize),
    ]


def both_towers(
    architecture: Mapping[str, Any], lengths: Sequence[int], itemsize: int, *, dense: bool = False
) -> list[Work]:
    """Images and as many captions of these lengths, and the logits of all pairs."""
    batch = len(lengths)
    return [
        *image_tower(architecture, batch, itemsize, dense=dense),
        *text_tower(architecture, lengths, itemsize, dense=dense),
        *logits(batch, batch, architecture["embed_dim"], itemsize),
    ]


def train_step(
    architecture: Mapping[str, Any], lengths: Sequence[int], itemsize: int, *, parameters: int, dense: bool = False
) -> list[Work]:
    """Forward, backward and AdamW; the weights and its two moments in float32.

    parameters: how many numbers are trained.
    """
    forward = both_towers(architecture, lengths, itemsize, dense=dense)
    # nobody wants the gradient of a pixel
    gradients = [backward(work, inputs=i > 0) for i, work in enumerate(forward)]
    # weight, gradient and both moments in; weight and moments out
    return [*forward, *gradients, Work(0, 16 * parameters, 12 * parameters, updated=28 * parameters)]


def works_of(
    architecture: Mapping[str, Any], tower: str, lengths: Sequence[int], itemsize: int, *, parameters: int = 0
) -> list[Work]:
    """The launches of "image", "text", "both" or "train", of len(lengths) images and captions."""
    if tower == "image":
        return image_tower(architecture, len(lengths), itemsize)
    if tower == "text":
        return text_tower(architecture, lengths, itemsize)
    if tower == "both":
        return both_towers(architecture, lengths, itemsize)
    return train_step(architecture, lengths, itemsize, parameters=parameters)


def dense_flops(architecture: Mapping[str, Any], tower: str, batch: int = 1) -> int:
    """Operations that openai/CLIP spends on a batch, padding, masked scores and rows that nobody reads included.

    For a transformer of width W on L tokens, with N layers: N (24 L W^2 + 4 L^2 W), then the projection of one row, and
    for images the patch embedding.
    """
    lengths = [architecture["context_length"]] * batch
    make = {"text": text_tower, "both": both_towers}
    if tower == "image":
        works = image_tower(architecture, batch, 1, dense=True)
    elif tower == "train":
        works = train_step(architecture, lengths, 1, parameters=0, dense=True)
    else:
        works = make[tower](architecture, lengths, 1, dense=True)
    return total(works).flops
