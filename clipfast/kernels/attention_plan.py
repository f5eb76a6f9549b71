"""Which rows each program of an attention kernel works on: tensors made on the host from the lengths."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import packing, tuning
from clipfast.packing import Rows, derive_for_good


class Plan(NamedTuple):
    """What each program of a launch works on."""

    block: int  # rows of a tile, or of a block of queries
    programs: Tensor  # [n, 2] tiles, or [n, 3] blocks of queries
    spans: Tensor | None  # [T, 2] for tiles: first row and end of each row's sequence
    peel: bool = False
    tail: int = 0


def plan(rows: Rows, causal: bool, heads: int, width: int, dtype: torch.dtype, tf32: bool, architecture: int) -> Plan:
    """The plan for these rows, on the CPU; of stable rows, filled up with programs that have nothing to do."""
    longest, n_sequences = max(rows.lengths, default=0), len(rows.lengths)
    if rows.stable and longest <= 128:
        longest = min(128, rows.total)  # no choice may depend on the lengths
    n_programs = n_sequences * heads
    block = tuning.attention_tile_block(longest, n_programs, width, dtype, architecture, tf32=tf32)
    if block:
        tiles, spans = packing.tiles(rows.lengths, block), packing.spans(rows.lengths)
        # neighbouring tiles together hold more than one block, or they would be one
        return Plan(block, _filled(tiles, min(n_sequences, 2 * rows.total // (block + 1) + 1), rows), spans)
    block = tuning.attention_stream_block(longest, n_programs, width, dtype, architecture, tf32=tf32)
    block_n = tuning.attention_stream(block, width, dtype, architecture, tf32=tf32).block_n
    return Plan(block, _blocks(rows, block), None, *_peel_and_tail(rows.lengths, causal, block_n))


def _blocks(rows: Rows, block: int) -> Tensor:
    return _filled(packing.query_blocks(rows.lengths, block), rows.total // block + len(rows.lengths), rows)


def _filled(programs: Tensor, most: int, rows: Rows) -> Tensor:
    return F.pad(programs, (0, 0, 0, most - len(programs))) if rows.stable else programs


def _peel_and_tail(lengths: tuple[int, ...], causal: bool, block_n: int) -> tuple[bool, int]:
    """Whether to take the first key alone, and how many keys a masked block needs to hold (0: nothing to mask)."""
    # 257 and 577 are 256 + 1 and 576 + 1
    peel = not causal and {length % block_n for length in set(lengths) if length} == {1}
    return peel, 0 if peel else _tail(lengths, causal, block_n)


def _tail(lengths: tuple[int, ...], causal: bool, block: int) -> int:
    """Rows that a masked block needs to hold, where the others hold `block` of them; 0 if nothing is masked."""
    if causal:
        return block  # the diagonal is masked whatever the lengths
    most = max((length % block for length in set(lengths)), default=0)
    return max(16, 1 << (most - 1).bit_length()) if most else 0


def backward_plan(
    rows: Rows, causal: bool, heads: int, width: int, dtype: torch.dtype, tf32: bool, architecture: int
) -> Plan:
    """As `plan`: the same tiles, or blocks of rows that are the queries of one kernel and the keys of the other."""
    forward = plan(rows, causal, heads, width, dtype, tf32, architecture)
    if forward.spans is not None and tuning.attention_bwd_tile(forward.block, width, dtype):
        return forward
    config = tuning.attention_bwd_stream(width, dtype, tf32=tf32)
    return Plan(config.block, _blocks(rows, config.block), None, False, _tail(rows.lengths, causal, config.inner))


def on_device(rows: Rows, device: torch.device, *choices: Any) -> Plan:
    """`plan` with its tensors on the device, made once; choices: its arguments after the rows."""
    if torch.compiler.is_compiling():
        return _constant(rows.traced_lengths(), rows.stable, device, *choices)
    return rows.derive(("attention", *choices), lambda rows: plan(rows, *choices), device)


def backward_on_device(rows: Rows, device: torch.device, *choices: Any) -> Plan:
    """As `on_device`, of `backward_plan`."""
    if torch.compiler.is_compiling():
        return _backward_constant(rows.traced_lengths(), rows.stable, device, *choices)
    return rows.derive(("attention_bwd", *choices), lambda rows: backward_plan(rows, *choices), device)


@torch.compiler.assume_constant_result  # a compiled graph holds the plan, not its making
def _constant(lengths: tuple[int, ...], stable: bool, device: torch.device, *choices: Any) -> Plan:
    return derive_for_good(lengths, stable, ("attention", *choices), lambda rows: plan(rows, *choices), device)


@torch.compiler.assume_constant_result
def _backward_constant(lengths: tuple[int, ...], stable: bool, device: torch.device, *choices: Any) -> Plan:
    key = ("attention_bwd", *choices)
    return derive_for_good(lengths, stable, key, lambda rows: backward_plan(rows, *choices), device)
