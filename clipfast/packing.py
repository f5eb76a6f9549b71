"""Rows and offsets: how sequences of different length lie one after another in one [T, W] tensor.

Both towers run on such rows. An image gives the same number of rows each time; a text gives the rows up to and
including its end-of-text token, because under the causal mask nothing after it can reach it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipfast.inputs import check_text

Derived = TypeVar("Derived")


@dataclass(frozen=True)
class Rows:
    """Lengths of the sequences packed in a [T, ...] tensor, in order; T = sum(lengths).

    stable: what kernels derive from the lengths has a size that follows from T and the number of sequences alone, at
            the price of programs with nothing to do: a CUDA graph serves every batch of one T.
    """

    lengths: tuple[int, ...]
    stable: bool = False

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def fixed(batch: int, length: int) -> Rows:
        """`batch` sequences of `length` rows each; the same object each time, to keep what is derived from it."""
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

    def parts(self, most: int) -> list[tuple[slice, slice, Rows]]:
        """Neighbours that have at most `most` rows together, or one sequence: (their rows, their sequences, Rows).

        About the same number of rows each, so that the last is no remainder.
        """
        goal = self.total / max(1, -(-self.total // most))
        parts: list[tuple[slice, slice, Rows]] = []
        first = begin = end = 0
        for sequence, length in enumerate(self.lengths):
            middle_after = end + length / 2 > goal * (len(parts) + 1)
            if sequence > first and (middle_after or end + length - begin > most):
                parts.append((slice(begin, end), slice(first, sequence), self._some(first, sequence)))
                first, begin = sequence, end
            end += length
        parts.append((slice(begin, end), slice(first, len(self.lengths)), self._some(first, len(self.lengths))))
        return parts

    def _some(self, first: int, last: int) -> Rows:
        lengths = self.lengths[first:last]
        return Rows.fixed(len(lengths), lengths[0]) if len(set(lengths)) == 1 else Rows(lengths)

    def traced_lengths(self) -> tuple[int, ...]:
        """The lengths while torch.compile traces: plain numbers, though it had seen others and made symbols of them."""
        return tuple(len(range(length)) for length in self.lengths)

    def offsets(self, device: torch.device | str = "cpu") -> Tensor:
        """[B + 1] int32, first row of each sequence; the last entry is T."""
        bounds = [0, *itertools.accumulate(self.lengths)]
        return torch.tensor(bounds, dtype=torch.int32, device="cpu").to(device, non_blocking=True)

    # setdefault, not cached_property: of several threads all get the one that is kept, and a CUDA graph's stays
    @property
    def _derived(self) -> dict[tuple[Hashable, torch.device], dict[Any, Any]]:
        return vars(self).setdefault("_derived_from_these", {})

    @property
    def makers(self) -> dict[Hashable, Callable[[Rows], Any]]:
        """How each thing derived from these rows is made from other ones."""
        return vars(self).setdefault("_makers", {})

    def derive(self, key: Hashable, make: Callable[[Rows], Derived], device: torch.device) -> Derived:
        """What a kernel makes of the lengths, its tensors on a device: made once and kept as long as the rows are.

        Every layer asks for the same; and a CUDA graph, which reads tensors by address, keeps them by keeping its rows.
        Each stream of a GPU has its own: what is copied and freed in one is not waited for in another. Stable rows
        belong to one batch, which is in one stream, or to a graph, which is recorded in another and replayed in any.
        key:  what it is; one key, one make.
        make: from the rows, a tensor on the CPU or a named tuple with such tensors in it.
        """
        stream = None if self.stable or device.type != "cuda" else torch.cuda.current_stream(device)
        of_streams = self._derived.setdefault((key, device), {})
        found = of_streams.get(stream)
        if found is None and of_streams and stream is not None and torch.cuda.is_current_stream_capturing():
            # the caller's own graph, warmed up in another stream, as is usual: nothing can be copied to the GPU now
            return next(iter(of_streams.values()))
        if found is None:
            self.makers[key] = make
            with torch.inference_mode(False):  # it may outlive the caller's inference mode
                made = make(self)
                found = map_tensors(made, lambda tensor: tensor.to(device, non_blocking=True))
            found = of_streams.setdefault(stream, found)
        return found


@functools.lru_cache(maxsize=64)
def _of_lengths(lengths: tuple[int, ...], stable: bool) -> Rows:
    return Rows(lengths, stable)


def derive_for_good(
    lengths: tuple[int, ...], stable: bool, key: Hashable, make: Callable[[Rows], Derived], device: torch.device
) -> Derived:
    """`Rows.derive` for a graph of torch.compile, which is traced once and runs in any stream.

    From plain numbers: PyTorch 2.11 takes no Rows for a constant.
    """
    found = _of_lengths(lengths, stable).derive(key, make, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or a named tuple with tensors in it, with each of them changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(*(change(part) if isinstance(part, Tensor) else part for part in value))


# a batch of stable rows is filled up to a multiple of this at least: what the tiles of a product are multiples of
STEP = 16
# rows of a sequence that only fills: no longer than texts are
FILLER = 64


def filling(total: int) -> list[int]:
    """Lengths of sequences of no text that fill `total` rows up to one of few numbers: 32 between powers of two.

    At most 3.2 % more rows from 512 on. How many sequences there are follows from the number of rows then reached.
    """
    step = max(STEP, (1 << total.bit_length() - 1) // 32)
    count = -(-step // FILLER)
    rows = -(-(total + count) // step) * step - total
    return [rows // count + (i < rows % count) for i in range(count)]


@dataclass(frozen=True)
class PackedText:
    """Texts sorted by length (equal lengths become neighbours), each cut after its end-of-text token.

    ids, positions: [T] int64.   rows: their lengths.   last: [number of sequences] int64, the last row of each.
    restore: [B] int64, puts per-text results back into the caller's order: `result[restore]`.
    """

    ids: Tensor
    positions: Tensor
    last: Tensor
    restore: Tensor
    rows: Rows

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ids, self.positions, self.last, self.restore

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedText:
        ids, positions, last, restore = map(change, self.tensors)
        return PackedText(ids, positions, last, restore, self.rows)

    def to(self, device: torch.device) -> PackedText:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def pack_text(text: Tensor, context_length: int, vocab_size: int, *, stable: bool = False) -> PackedText:
    """Drops what follows each end-of-text token (the largest id, as in openai/CLIP) and packs the rest.

    text:    [B, <= context_length] integer ids, any device; one copy to the host if it is not there already.
    stable:  appends sequences of no text (`filling`), so that few batches differ in T; `restore` leaves them out.
    Returns: PackedText on the CPU.
    Raises:  TypeError or ValueError naming the argument; ValueError for an id outside the vocabulary.
    """
    check_text(text, context_length)
    # NumPy's operators take a third of the time of PyTorch's on so few numbers (AMD EPYC, Zen 4, 2026-12-01)
    ids = text.detach().cpu().long().numpy()
    batch, width = ids.shape
    if batch and (ids.min() < 0 or ids.max() >= vocab_size):
        row, column = np.argwhere((ids < 0) | (ids >= vocab_size))[0]
        raise ValueError(f"text[{row}, {column}] is {ids[row, column]}, outside the vocabulary of {vocab_size} ids")
    lengths = ids.argmax(axis=1) + 1
    order = lengths.argsort(kind="stable")
    restore = np.empty_like(order)
    restore[order] = np.arange(batch)
    lengths = lengths[order]
    kept = np.arange(width) < lengths[:, None]
    positions, ids = kept.nonzero()[1], ids[order][kept]
    if stable:
        fillers = filling(len(ids))
        ids, positions = (np.pad(x, (0, sum(fillers))) for x in (ids, positions))
        lengths = np.append(lengths, fillers)
    ids, positions, last, restore = map(torch.from_numpy, (ids, positions, lengths.cumsum() - 1, restore))
    return PackedText(ids, positions, last, restore, Rows(tuple(lengths.tolist()), stable))


# ---------------------------------------------------------------------------------------------------------------------
# Plans: which rows each program of an attention kernel works on


def tiles(lengths: Sequence[int], block: int) -> Tensor:
    """Ranges [start, end) of at most `block` rows, each as many whole neighbouring sequences as fit.

    lengths: none above block.
    Returns: [n, 2] int32 on the CPU; the ranges follow one another and cover all rows.
    """
    starts: list[int] = []
    for first, _, count, length in Rows(tuple(lengths)).runs:
        if length:
            room = starts[-1] + block - first if starts else 0
            joined = min(count, room // length)
            end = first + count * length
            starts.extend(range(first + joined * length, end, block // length * length))
    bounds = torch.tensor([*starts, sum(lengths)], dtype=torch.int32, device="cpu")
    return torch.stack([bounds[:-1], bounds[1:]], dim=1)


def spans(lengths: Sequence[int]) -> Tensor:
    """[T, 2] int32 on the CPU: for each row, the first row of its sequence and the row after the last."""
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0)
    return torch.repeat_interleave(torch.stack([ends - counts, ends], dim=1).int(), counts, dim=0)


def query_blocks(lengths: Sequence[int], block: int) -> Tensor:
    """[n, 3] int32 on the CPU: (first query row, first row, end) of each block of queries and of its sequence."""
    counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0)
    n_blocks = (counts + block - 1) // block
    sequence = torch.repeat_interleave(n_blocks)
    within = torch.arange(len(sequence), device="cpu") - (n_blocks.cumsum(0) - n_blocks)[sequence]
    starts = (ends - counts)[sequence]
    return torch.stack([starts + within * block, starts, ends[sequence]], dim=1).int()
