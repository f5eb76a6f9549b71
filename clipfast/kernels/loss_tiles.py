"""The symmetric contrastive loss in plain PyTorch, tile by tile of the logits: any device, any floating dtype.

Two passes over the logits, neither of which holds them. `statistics` gives what the loss needs of each row and column,
`gradients` computes every tile again. In exact arithmetic, with c = images @ texts.T, labels on a diagonal and

    p[i, j] = exp(scale c[i, j]) / sum_k exp(scale c[i, k])        (of the rows; q of the columns likewise)
    row i of the loss = -log p[i, label i]

the gradient of the sum of all rows' and columns' losses is that of scale * c times G = p + q - 2 (the last on the
diagonal), and that of scale is the sum of p (c - c[i, label i]) + q (c - c[label j, j]), whose terms all have one sign
where a sample is nearest to its own label: nothing cancels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import library
from clipfast.kernels.eager import statistics_dtype


class Softmaxes(NamedTuple):
    """Of the rows, or of the columns, of the logits; each [n] in the wide dtype."""

    highest: Tensor  # greatest logit
    sums: Tensor  # of exponentials of logits less the greatest: their logarithm keeps its digits where logits are large
    products: Tensor  # features of the row times those of its label: the logit without scale
    weights: Tensor | None = None  # of the row's loss in the sum; None: all one

    def logs(self, scale: Tensor) -> Tensor:
        """Log-probabilities of the labels: minus the rows' losses."""
        return self.products * scale - self.highest - self.sums.log()

    def factors(self) -> Tensor:
        """What turns exponentials into weighted probabilities."""
        return self.sums.reciprocal() if self.weights is None else self.weights / self.sums

    def part(self, where: slice) -> Softmaxes:
        return Softmaxes(*(None if x is None else x[where] for x in self))


class Transform(Protocol):
    def __call__(
        self, products: Tensor, scale: Tensor, rows: Softmaxes, cols: Softmaxes, separate: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def spans(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


@functools.cache
def _widens_products() -> bool:
    """Whether products of half-precision matrices on a GPU can leave their float32 sums as they are (PyTorch 2.8)."""
    return "dtype" in torch.ops.aten.mm.overloads()


def _half_products(x: Tensor) -> bool:
    return x.dtype.itemsize == 2 and x.device.type == "cuda" and _widens_products()


def _operand(x: Tensor) -> Tensor:
    """What is multiplied: where float32 sums of half-precision products are not to be had, float32."""
    return x if _half_products(x) else x.to(statistics_dtype(x.dtype))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in the wide dtype."""
    return torch.mm(a, b, out_dtype=torch.float32) if _half_products(a) else torch.mm(a, b)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if _half_products(b):
        total += _product(a, b)
    else:
        total.addmm_(a, b)


def _merge(highest: Tensor, total: Tensor, logits: Tensor, dim: int, spare: Tensor) -> None:
    """Takes a tile into the running maxima, and sums of exponentials below them, of its rows (dim 1) or columns (0)."""
    higher = torch.maximum(highest, logits.amax(dim))
    torch.sub(logits, higher.unsqueeze(dim), out=spare).exp_()
    total.mul_(highest.sub_(higher).exp_()).add_(spare.sum(dim))
    highest.copy_(higher)


def statistics(images: Tensor, texts: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """What the loss needs of logits = scale * images @ texts.T.

    images:  [n, E], whose labels are the texts from `offset` on.   texts: [N, E], same dtype.   scale: [] wide.
    Returns: of the rows [3, n] and of the columns [2, N], wide: what `Softmaxes` holds, the columns without products.
    """
    wide = statistics_dtype(images.dtype)
    rows, cols = (images.new_zeros(shape, dtype=wide) for shape in ((3, len(images)), (2, len(texts))))
    rows[0] = cols[0] = -torch.inf
    side = tuning.loss_side(images.device)
    for here in spans(len(images), side):
        image = _operand(images[here])
        for there in spans(len(texts), side):
            logits = _product(image, _operand(texts[there]).t())
            spare = torch.empty_like(logits)
            of_labels, at = diagonal(logits, offset + here.start - there.start)
            rows[2, here][at] = of_labels
            logits.mul_(scale)
            _merge(rows[0, here], rows[1, here], logits, 1, spare)
            _merge(cols[0, there], cols[1, there], logits, 0, spare)
    return rows, cols


def diagonal(tile: Tensor, first: int) -> tuple[Tensor, slice]:
    """Where a tile holds labels, the label of its row 0 being in its column `first`: a view of them, and their rows."""
    on_it = tile.diagonal(first) if -tile.shape[0] < first < tile.shape[1] else tile.new_empty(0)
    return on_it, slice(max(0, -first), max(0, -first) + len(on_it))


def _transform(
    products: Tensor, scale: Tensor, rows: Softmaxes, cols: Softmaxes, separate: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From a tile of products to its part of G, but for the labels, and of the gradient of scale; overwrites the tile.

    separate: keep the rows' and the columns' parts of G apart; else both are their sum.
    Returns:  the two parts of G, in dtype; sums over each row and column of p (c - c of the label), p not divided by
              the softmax's sum.
    """
    of_rows = torch.mul(products, scale).sub_(rows.highest[:, None]).exp_()
    spare = products - rows.products[:, None]
    of_scale_rows = spare.mul_(of_rows).sum(1)
    of_cols = torch.mul(products, scale, out=spare).sub_(cols.highest).exp_()
    of_scale_cols = products.sub_(cols.products).mul_(of_cols).sum(0)
    of_cols.mul_(cols.factors())
    if separate:
        return of_rows.mul_(rows.factors()[:, None]).to(dtype), of_cols.to(dtype), of_scale_rows, of_scale_cols
    by_both = of_cols.addcmul_(of_rows, rows.factors()[:, None]).to(dtype)
    return by_both, by_both, of_scale_rows, of_scale_cols


def _set_labels(by_rows: Tensor, by_cols: Tensor, scale: Tensor, rows: Softmaxes, cols: Softmaxes, first: int) -> None:
    """Completes G: p - 1 at the labels, before rounding to G's dtype.   first: column of row 0's label."""
    on_rows, at = diagonal(by_rows, first)
    if not len(on_rows):
        return
    rows, cols = rows.part(at), cols.part(slice(at.start + first, at.stop + first))
    of_rows, of_cols = (
        each.logs(scale).expm1_() * (1 if each.weights is None else each.weights) for each in (rows, cols)
    )
    if by_cols is by_rows:
        on_rows.copy_(of_rows + of_cols)
    else:
        on_rows.copy_(of_rows)
        diagonal(by_cols, first)[0].copy_(of_cols)


def gradients_by(
    transform: Transform,
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    offset: int,
    factor: Tensor,
    rows: Softmaxes,
    cols: Softmaxes,
    separate: bool,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gradients`, with the part between the products given."""
    wide = statistics_dtype(images.dtype)
    of_images = torch.empty_like(images) if wants[0] else images.new_empty(0)
    of_texts = texts.new_zeros(texts.shape if wants[1] else 0, dtype=wide)
    of_rows, of_cols = (images.new_zeros(len(x), dtype=wide) for x in (images, texts))
    side = tuning.loss_side(images.device)
    for here in spans(len(images), side):
        image = _operand(images[here])
        total = images.new_zeros(image.shape if wants[0] else 0, dtype=wide)
        for there in spans(len(texts), side):
            text = _operand(texts[there])
            tile = _product(image, text.t())
            softmaxes = rows.part(here), cols.part(there)
            first = offset + here.start - there.start
            # to the bit, so that a label is no distance from itself, even where another kernel multiplied before
            on_tile, at = diagonal(tile, first)
            on_tile.copy_(softmaxes[0].products[at])
            by_rows, by_cols, of_scale_rows, of_scale_cols = transform(tile, scale, *softmaxes, separate, text.dtype)
            _set_labels(by_rows, by_cols, scale, *softmaxes, first)
            of_rows[here] += of_scale_rows
            of_cols[there] += of_scale_cols
            if wants[0]:
                _accumulate(total, by_rows, text)
            if wants[1]:
                _accumulate(of_texts[there], by_cols.t(), image)
        if wants[0]:
            of_images[here] = total.mul_(factor)
    return of_images, of_texts, of_rows.div_(rows.sums), of_cols.div_(cols.sums)


def gradients(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    offset: int,
    factor: Tensor,
    rows: Softmaxes,
    cols: Softmaxes,
    separate: bool,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum of the rows' and the columns' losses, by their weights.

    images, texts, scale, offset: as in `statistics`.   factor: [], multiplies the images' gradient.
    rows, cols: of all rows [n] and columns [N].
    separate:   the images' gradient is that of the rows' losses alone, the texts' that of the columns' alone.
    wants:      whether the images' gradient is wanted, and whether the texts' is; empty tensors stand for the others.
    Returns:    of the images, times factor, [n, E] in their dtype; of the texts, without factor and without scale,
                [N, E] wide, summed over the images given; for each row [n] and column [N] its loss's derivative by
                scale, the columns' also over the images given, both without weights.
    """
    return gradients_by(_transform, images, texts, scale, offset, factor, rows, cols, separate, wants)


# ---------------------------------------------------------------------------------------------------------------------
# Registered, for torch.compile: a graph that followed every tile would have thousands of nodes


def statistics_fake(images: Tensor, texts: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    wide = statistics_dtype(images.dtype)
    return images.new_empty(3, images.shape[0], dtype=wide), images.new_empty(2, texts.shape[0], dtype=wide)


def gradients_fake(images, texts, scale, offset, factor, rows, cols, separate, wants):
    wide = statistics_dtype(images.dtype)
    of_images = torch.empty_like(images) if wants[0] else images.new_empty(0)
    of_texts = texts.new_empty(texts.shape if wants[1] else 0, dtype=wide)
    return of_images, of_texts, *(images.new_empty(x.shape[0], dtype=wide) for x in (images, texts))


STATISTICS_SCHEMA = "(Tensor images, Tensor texts, Tensor scale, int offset) -> (Tensor, Tensor)"
GRADIENTS_SCHEMA = (
    "(Tensor images, Tensor texts, Tensor scale, int offset, Tensor factor, Tensor?[] rows, Tensor?[] cols, "
    "bool separate, bool[2] wants) -> (Tensor, Tensor, Tensor, Tensor)"
)


def takes_lists(function: Callable) -> Callable:
    """`gradients` as the registered operator calls it: a schema knows no named tuples."""

    def run(images, texts, scale, offset, factor, rows, cols, separate, wants):
        return function(
            images, texts, scale, offset, factor, Softmaxes(*rows), Softmaxes(*cols), separate, tuple(wants)
        )

    return run


_statistics = library.define(f"contrastive_statistics{STATISTICS_SCHEMA}", statistics, statistics_fake)
_gradients = library.define(f"contrastive_gradients{GRADIENTS_SCHEMA}", takes_lists(gradients), gradients_fake)
