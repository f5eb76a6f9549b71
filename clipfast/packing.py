"""Rows and offsets: how sequences of different length lie one after another in one [T, W] tensor.

Both towers run on such rows. An image gives the same number of rows each time; a text gives the rows up to and
including its end-of-text token, because under the causal mask nothing after it can reach it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clipfast.inputs import check_text


@dataclass(frozen=True)
class Rows:
    """Lengths of the sequences packed in a [T, ...] tensor, in order; T = sum(lengths)."""

    lengths: tuple[int, ...]

    @staticmethod
    def fixed(batch: int, length: int) -> Rows:
        """`batch` sequences of `length` rows each."""
        return Rows((length,) * batch)

    @staticmethod
    def of(offsets: Rows | Tensor | Sequence[int]) -> Rows:
        """Rows themselves, or rows from offsets [B + 1] (first row of each sequence, last entry T).

        Raises: ValueError if offsets do not start at 0 or decrease.
        """
        if isinstance(offsets, Rows):
            return offsets
        bounds = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
        lengths = tuple(b - a for a, b in itertools.pairwise(bounds))
        if not bounds or bounds[0] != 0 or any(length < 0 for length in lengths):
            raise ValueError(f"offsets must start at 0 and never decrease, got {bounds[:8]}")
        return Rows(lengths)

    @cached_property
    def total(self) -> int:
        return sum(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int, int], ...]:
        """Neighbours of equal length as (first row, first sequence, number of sequences, length)."""
        runs, row, sequence = [], 0, 0
        for length, same in itertools.groupby(self.lengths):
            count = sum(1 for _ in same)
            runs.append((row, sequence, count, length))
            row, sequence = row + count * length, sequence + count
        return tuple(runs)

    def offsets(self, device: torch.device | str = "cpu") -> Tensor:
        """[B + 1] int32, first row of each sequence; the last entry is T."""
        bounds = [0, *itertools.accumulate(self.lengths)]
        return torch.tensor(bounds, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


@dataclass(frozen=True)
class PackedText:
    """Texts sorted by length (equal lengths become neighbours), each cut after its end-of-text token.

    ids, positions: [T] int64.   rows: their lengths.   last: [B] int64, row of each end-of-text token.
    restore: [B] int64, puts per-text results back into the caller's order: `result[restore]`.
    """

    ids: Tensor
    positions: Tensor
    rows: Rows
    last: Tensor
    restore: Tensor


def pack_text(text: Tensor, context_length: int, vocab_size: int) -> PackedText:
    """Drops what follows each end-of-text token (the largest id, as in openai/CLIP) and packs the rest.

    text:    [B, <= context_length] integer ids, any device; one copy to the host if it is not there already.
    Returns: PackedText on text's device.
    Raises:  TypeError or ValueError naming the argument; ValueError for an id outside the vocabulary.
    """
    check_text(text, context_length)
    ids = text.detach().cpu().long()
    batch, width = ids.shape
    if batch and (ids.min() < 0 or ids.max() >= vocab_size):
        row, column = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
        raise ValueError(
            f"text[{row}, {column}] is {ids[row, column].item()}, outside the vocabulary of {vocab_size} ids"
        )
    lengths, order = torch.sort(ids.argmax(dim=-1) + 1, stable=True)
    places = torch.arange(width, device="cpu")  # whatever the default device
    kept = places < lengths[:, None]
    positions = places.expand(batch, width)[kept]
    restore = torch.empty_like(order).scatter_(0, order, torch.arange(batch, device="cpu"))
    return PackedText(
        ids=ids[order][kept].to(text.device, non_blocking=True),
        positions=positions.to(text.device, non_blocking=True),
        rows=Rows(tuple(lengths.tolist())),
        last=(lengths.cumsum(0) - 1).to(text.device, non_blocking=True),
        restore=restore.to(text.device, non_blocking=True),
    )
