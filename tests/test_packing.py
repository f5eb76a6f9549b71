"""Packed rows: what pack_text keeps of a batch of texts, and where; how sequences lie in rows."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfast import packing
from clipfast.packing import PackedText, Rows, pack_text

LENGTHS = st.lists(st.integers(0, 9), max_size=8)


@st.composite
def texts(draw):
    """[B, width] ids below 30, in which the greatest may stand anywhere and more than once."""
    width = draw(st.integers(1, 12))
    ids = st.lists(st.integers(0, 29), min_size=width, max_size=width)
    rows = draw(st.lists(ids, max_size=8))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)


@given(lengths=LENGTHS)
def test_rows(lengths):
    rows = Rows(tuple(lengths))
    assert rows.total == sum(lengths)
    offsets = rows.offsets()
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for given_as in (rows, offsets, offsets.long(), offsets.tolist(), tuple(offsets.tolist())):
        assert Rows.of(given_as) == rows
        assert hash(Rows.of(given_as)) == hash(rows)
    # runs: neighbours of one length, in order, with nothing left out
    first = sequence = 0
    for (row, number, count, length), following in zip(rows.runs, (*rows.runs[1:], None), strict=False):
        assert (row, number) == (first, sequence) and count > 0
        assert lengths[sequence : sequence + count] == [length] * count
        assert following is None or following[3] != length
        first, sequence = first + count * length, sequence + count
    assert (first, sequence) == (rows.total, len(lengths))


def test_rows_of_one_length():
    assert Rows.fixed(3, 5) == Rows((5, 5, 5))
    assert Rows.fixed(3, 5).runs == ((0, 0, 3, 5),)
    assert Rows.fixed(0, 5).runs == () and Rows.fixed(0, 5).total == 0
    assert Rows.fixed(0, 5).offsets().tolist() == [0]


@given(lengths=LENGTHS, most=st.integers(1, 12))
def test_parts_of_rows(lengths, most):
    rows = Rows(tuple(lengths))
    parts = rows.parts(most)
    row = sequence = 0
    for some, sequences, part in parts:
        assert (some.start, sequences.start) == (row, sequence)
        row, sequence = some.stop, sequences.stop
        assert part == Rows(tuple(lengths[sequences])) and part.total == row - some.start
        assert part.total <= most or len(part.lengths) == 1
    assert (row, sequence) == (rows.total, len(lengths))
    assert len(parts) == 1 or all(part.lengths for _, _, part in parts)


def test_parts_are_about_as_large_as_each_other():
    assert [part.total for *_, part in Rows.fixed(32, 50).parts(1365)] == [800, 800]
    assert [len(part.lengths) for *_, part in Rows.fixed(32, 257).parts(2048)] == [6, 7, 6, 7, 6]
    assert [part.total for *_, part in Rows((3, 3, 4, 4, 5, 5)).parts(13)] == [10, 9, 5]
    assert Rows.fixed(6, 50).parts(100)[0][2] is Rows.fixed(2, 50)


@pytest.mark.parametrize("offsets", [[], [1], [1, 3], [0, 3, 2], [0, -1], torch.tensor([2, 4])])
def test_wrong_offsets(offsets):
    with pytest.raises(ValueError, match="offsets must start at 0 and never decrease, got"):
        Rows.of(offsets)


def _unpacked(packed: PackedText) -> list[tuple[list[int], list[int], int]]:
    """Per text, in the caller's order: ids, positions and the packed row of its last."""
    bounds = packed.rows.offsets().tolist()
    parts = []
    for i, last in enumerate(packed.last.tolist()):
        span = slice(bounds[i], bounds[i + 1])
        parts.append((packed.ids[span].tolist(), packed.positions[span].tolist(), last - bounds[i]))
    return [parts[i] for i in packed.restore.tolist()]


@given(text=texts())
@settings(max_examples=200)
def test_each_text_is_kept_up_to_its_greatest_id_and_nothing_else(text):
    packed = pack_text(text, 12, 30)
    assert len(packed.ids) == len(packed.positions) == packed.rows.total
    for row, (ids, positions, last) in zip(text.tolist(), _unpacked(packed), strict=True):
        end = row.index(max(row))  # the first of the greatest, as openai/CLIP's argmax
        assert ids == row[: end + 1]
        assert positions == list(range(end + 1))
        assert last == end
    # texts of one length are neighbours: one run each
    lengths = [length for _, _, _, length in packed.rows.runs]
    assert len(lengths) == len(set(lengths))
    assert {packed.ids.dtype, packed.positions.dtype, packed.last.dtype, packed.restore.dtype} == {torch.int64}
    assert sorted(packed.restore.tolist()) == list(range(len(text)))


@given(text=texts(), data=st.data())
def test_what_follows_the_greatest_id_does_not_count(text, data):
    other = text.clone()
    for row in other:
        end = int(row.argmax())
        greatest = int(row[end])
        for column in range(end + 1, len(row)):
            row[column] = data.draw(st.integers(0, greatest))
    before, after = pack_text(text, 12, 30), pack_text(other, 12, 30)
    assert before.rows == after.rows
    for name in ("ids", "positions", "last", "restore"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


def test_the_callers_ids_stay_as_they_were():
    text = torch.tensor([[5, 29, 3], [29, 1, 2], [1, 2, 3]], dtype=torch.int32)
    before = text.clone()
    packed = pack_text(text, 12, 30)
    packed.ids.zero_()
    assert torch.equal(text, before) and packed.ids.dtype == torch.int64
    assert _unpacked(pack_text(text, 12, 30)) == [([5, 29], [0, 1], 1), ([29], [0], 0), ([1, 2, 3], [0, 1, 2], 2)]


def test_equal_lengths_keep_the_callers_order():
    """So that a batch of full-length texts is not gathered for nothing; in a large batch as well."""
    large = pack_text(torch.tensor([[1, 29], [29, 0]] * 500), 12, 30)
    assert torch.equal(large.restore, torch.arange(1000).view(2, 500).flip(0).t().flatten())
    text = torch.tensor([[1, 29], [2, 29], [29, 0], [3, 29]])
    packed = pack_text(text, 12, 30)
    assert packed.ids.tolist() == [29, 1, 29, 2, 29, 3, 29]
    assert packed.restore.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.tensor([[1, 2], [3, 30]]), ValueError, r"text\[1, 1\] is 30, outside the vocabulary of 30 ids"),
        (torch.tensor([[1, -7], [3, 30]]), ValueError, r"text\[0, 1\] is -7"),
        (torch.zeros(2, 13, dtype=torch.int64), ValueError, r"text must be \[B, 1 to 12\] token ids, got \[2, 13\]"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"got \[2, 0\]"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"got \[2\]"),
        (torch.zeros(2, 3), TypeError, "token ids .* got torch.float32"),
        ([[1, 2]], TypeError, "token ids .* got list"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_wrong_ids(text, error, message):
    with pytest.raises(error, match=message):
        pack_text(text, 12, 30)


# ---- what kernels derive from rows ----


@pytest.fixture
def mocked_cuda(monkeypatch):
    """torch.cuda mocked: the current stream is what a test says, and copies to the GPU are left out."""
    state = SimpleNamespace(stream="first", capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(packing, "map_tensors", lambda made, change: made)
    return state


def test_each_stream_has_what_it_derived_itself(mocked_cuda):
    """What one stream copies to the GPU another does not wait for, nor for what it still reads when that is freed."""
    rows, gpu = Rows((3, 4)), torch.device("cuda", 0)
    first = rows.derive("offsets", Rows.offsets, gpu)
    assert rows.derive("offsets", Rows.offsets, gpu) is first
    mocked_cuda.stream = "second"
    second = rows.derive("offsets", Rows.offsets, gpu)
    assert second is not first and rows.derive("offsets", Rows.offsets, gpu) is second
    mocked_cuda.stream = "first"
    assert rows.derive("offsets", Rows.offsets, gpu) is first
    assert rows.derive("offsets", Rows.offsets, torch.device("cuda", 1)) is not first


def test_a_callers_graph_takes_what_was_derived_while_it_warmed_up(mocked_cuda):
    rows, gpu = Rows((3, 4)), torch.device("cuda", 0)
    warm = rows.derive("offsets", Rows.offsets, gpu)
    mocked_cuda.stream, mocked_cuda.capturing = "capture", True
    assert rows.derive("offsets", Rows.offsets, gpu) is warm
    mocked_cuda.capturing = False
    assert rows.derive("offsets", Rows.offsets, gpu) is not warm


def test_stable_rows_are_recorded_in_one_stream_and_replayed_in_another(mocked_cuda):
    rows, gpu = Rows((3, 4), stable=True), torch.device("cuda", 0)
    first = rows.derive("offsets", Rows.offsets, gpu)
    mocked_cuda.stream = "second"
    assert rows.derive("offsets", Rows.offsets, gpu) is first


def test_threads_derive_one_thing():
    """A graph reads it by address: a second one must not take the place of the first, whoever is done later."""
    rows = Rows((3, 4))

    def slow(rows):
        time.sleep(0.05)
        return rows.offsets()

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: rows.derive("offsets", slow, torch.device("cpu")), range(8))]
    assert len(set(map(id, found))) == 1
    assert [*rows.makers] == ["offsets"]
