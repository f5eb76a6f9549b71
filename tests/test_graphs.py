"""CUDA graphs: which calls are replayed, from which recording, and that the numbers are the same.

Without a GPU a recording is the function itself, run again on the very tensors it was recorded with: all but CUDA's
part.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import clipfast
from clipfast import compat, graphs
from clipfast.packing import filling, pack_text

from .clips import make_images, randomise

# heads of 16, so that the kernels run them; two blocks, the second one pooled
SIZES = (16, 16, 2, 32, 8, 12, 60, 32, 2, 2)
VOCABULARY = 60


def _make(device):
    return randomise(clipfast.CLIP(*SIZES, vision_heads=2)).to(device).requires_grad_(False)


def _rerun(function, device, pool, side):
    output = function()

    def replay():
        # a GPU writes to memory in any mode
        with torch.inference_mode():
            output.copy_(function())

    return graphs.Recording(replay, output, 1)


def _texts(*lengths: int) -> torch.Tensor:
    text = torch.zeros(len(lengths), 12, dtype=torch.int64)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.randint(1, VOCABULARY - 1, (length,))
        row[length - 1] = VOCABULARY - 1
    return text


@pytest.fixture
def model(device, monkeypatch):
    """A small CLIP whose batches are replayed; on a CPU as far as that goes."""
    if device == "cpu":
        monkeypatch.setattr(graphs, "record", _rerun)
        monkeypatch.setattr(graphs, "suit", graphs._suits)
    with clipfast.backend("triton"), torch.no_grad():
        yield _make(device)


@pytest.fixture
def recorded(monkeypatch):
    """What has been recorded so far: the kind and the shape of each."""
    kinds, add = [], graphs.Graphs.add

    def noting(self, key, *rest):
        kinds.append(key[0] if isinstance(key[0], str) else key[0][0])
        return add(self, key, *rest)

    monkeypatch.setattr(graphs.Graphs, "add", noting)
    return kinds


def _without(model, function):
    model.cuda_graphs = False
    try:
        return function()
    finally:
        del model.cuda_graphs


def test_the_same_bits_with_and_without(model, device, recorded):
    for seed in range(3):
        images = make_images(SIZES, 2, seed).to(device)
        assert torch.equal(model.encode_image(images), _without(model, lambda x=images: model.encode_image(x)))
    for lengths in ((3, 9, 2), (5, 5, 5), (12, 1, 1), (1, 2, 1)):
        text = _texts(*lengths).to(device)
        assert torch.equal(model.encode_text(text), _without(model, lambda x=text: model.encode_text(x)))
    assert recorded == ["image", "text"], "one recording serves every batch of its shape"


def test_what_runs_sequence_by_sequence_is_not_recorded(model, device, recorded):
    """PyTorch's attention, where the kernels refuse the heads: its launches depend on the lengths."""
    with clipfast.backend("torch"):
        for lengths in ((3, 9, 2), (5, 5, 4), (12, 1, 1)):
            text = _texts(*lengths).to(device)
            packed, again = (pack_text(text, 12, VOCABULARY, stable=True) for _ in range(2))
            got, wanted = graphs.encode_text(model, packed), model.encode_packed(again.to(device))
            assert torch.equal(got, wanted)
    assert recorded == []


def test_another_shape_is_another_recording(model, device, recorded):
    for batch in (1, 2, 1, 2):
        model.encode_image(make_images(SIZES, batch).to(device))
        model.encode_text(_texts(*[12] * batch).to(device))
    assert sorted(recorded) == ["image"] * 2 + ["text"] * 2
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, device=device)
    assert torch.equal(model.encode_image(pixels), _without(model, lambda: model.encode_image(pixels)))
    assert recorded.count("image") == 3


def test_a_result_outlives_the_next_replay(model, device):
    first, second = (make_images(SIZES, 1, seed).to(device) for seed in range(2))
    before = model.encode_image(first)
    kept = before.clone()
    model.encode_image(second)
    assert torch.equal(before, kept)


def test_weights_edited_in_place_are_seen(model, device, recorded):
    images, text = make_images(SIZES, 1).to(device), _texts(4).to(device)
    before = model.encode_image(images), model.encode_text(text)
    model.visual.proj.mul_(2)
    model.text_projection.data.mul_(2)
    torch.testing.assert_close(model.encode_image(images), 2 * before[0])
    torch.testing.assert_close(model.encode_text(text), 2 * before[1])
    assert recorded == ["image", "text"]


@pytest.mark.parametrize("where", ["visual.proj", "transformer.resblocks.1.mlp.c_fc.weight", "token_embedding.weight"])
def test_weights_that_move_discard_the_recordings(model, device, recorded, where):
    images, text = make_images(SIZES, 1).to(device), _texts(4).to(device)
    model.encode_image(images), model.encode_text(text)
    owner, _, name = where.rpartition(".")
    parameter = getattr(model.get_submodule(owner), name)
    parameter.data = torch.randn_like(parameter)
    for encode, given in ((model.encode_image, images), (model.encode_text, text)):
        assert torch.equal(encode(given), _without(model, lambda e=encode, x=given: e(x)))
    # an image's recording reads no weight of the texts; all go as soon as one tower's have moved
    assert recorded == ["image", "text", *(["image", "text"] if where == "visual.proj" else ["text"])]


def test_weights_laid_out_in_another_way_discard_the_recordings(model, device, recorded):
    """At the same address: a recording knows of strides, shapes and dtypes what was true then."""
    images = make_images(SIZES, 1).to(device)
    model.encode_image(images)
    weight = model.visual.transformer.resblocks[0].attn.out_proj.weight
    weight.data = weight.data.t()
    assert torch.equal(model.encode_image(images), _without(model, lambda: model.encode_image(images)))
    weight.data = weight.data.view(torch.int32).view(torch.float32)
    model.encode_image(images)
    assert recorded == ["image"] * 2


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_recording_serves_in_every_mode_without_gradients(model, device, recorded, modes):
    for seed, mode in enumerate(modes * 2):
        images, text = make_images(SIZES, 2, seed).to(device), _texts(3, 9).to(device)
        with mode():
            got = model.encode_image(images), model.encode_text(text)
        wanted = _without(model, lambda x=images, y=text: (model.encode_image(x), model.encode_text(y)))
        assert all(map(torch.equal, got, wanted))
        assert [x.is_inference() for x in got] == [mode is torch.inference_mode] * 2
    assert recorded == ["image", "text"]


def test_a_tensor_subclass_sees_every_function(model, device, recorded):
    class Seen(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    images = make_images(SIZES, 1).to(device)
    model.encode_image(images)
    model.encode_image(images.as_subclass(Seen))
    assert Seen.calls > 50 and recorded == ["image"]


def test_replicas_of_data_parallel_are_not_recorded(model, device, recorded):
    """They are other objects on each call, and their weights are no parameters."""
    images, text = make_images(SIZES, 1).to(device), _texts(4).to(device)
    replica = model._replicate_for_data_parallel()
    for name, parameter in model.named_parameters(recurse=False):
        setattr(replica, name, parameter.detach())
    assert torch.equal(replica.encode_image(images), model.encode_image(images))
    assert torch.equal(replica.encode_text(text), model.encode_text(text))
    assert recorded == ["image", "text"]


def test_another_switch_for_tf32_is_another_recording(model, device, recorded):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("PyTorch before 2.9 has one switch")
    images, before = make_images(SIZES, 1).to(device), matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            matmul.fp32_precision = precision
            model.encode_image(images)
    finally:
        matmul.fp32_precision = before
    assert len(recorded) == 2


def test_a_tower_of_another_make_is_not_replayed(model, device, recorded):
    del model.visual.positional_embedding
    model.visual.positional_embedding = torch.nn.Embedding(5, 32, device=device)
    model.visual.forward = lambda images: images.mean((2, 3))
    assert model.encode_image(make_images(SIZES, 2).to(device)).shape == (2, 3)
    assert recorded == []


def test_a_hook_is_called_every_time(model, device, recorded):
    images, text = make_images(SIZES, 1).to(device), _texts(4).to(device)
    model.encode_image(images), model.encode_text(text)
    calls = []
    for module in (model.visual, model.visual.transformer.resblocks[1], model.transformer.resblocks[0]):
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(2):
            model.encode_image(images), model.encode_text(text)
        handle.remove()
        assert len(calls) == 2
        calls.clear()
    assert recorded == ["image", "text"]


def test_large_batches_and_gradients_are_not_replayed(model, device, recorded, monkeypatch):
    with monkeypatch.context() as patch:
        # three images of five places, or as many texts of twelve, 32 wide in float32
        patch.setattr(graphs, "MAX_ACTIVATIONS", 2 * 5 * 32 * 4 * graphs.ACTIVATIONS)
        model.encode_image(make_images(SIZES, 3).to(device))
        model.encode_text(_texts(2, 2, 2).to(device))
    model.encode_image(make_images(SIZES, 1)[:0].to(device))
    model.encode_text(_texts(3)[:0].to(device))
    with torch.enable_grad():
        model.encode_image(make_images(SIZES, 1).to(device))
    model.cuda_graphs = False
    model.encode_image(make_images(SIZES, 1).to(device))
    assert recorded == []


@pytest.mark.parametrize("limit", ["MAX_GRAPHS", "MAX_BYTES"])
def test_memory_has_a_cap(model, device, monkeypatch, limit):
    monkeypatch.setattr(graphs, limit, 2)
    if device != "cpu":
        monkeypatch.setattr(graphs, "record", lambda *a, _record=graphs.record: _record(*a)._replace(n_bytes=1))
    for batch in range(1, 6):
        images = make_images(SIZES, batch).to(device)
        assert torch.equal(model.encode_image(images), _without(model, lambda x=images: model.encode_image(x)))
        assert len(graphs._models[model].entries) <= 2


def test_another_setting_is_another_recording(model, device, recorded):
    images = make_images(SIZES, 1).to(device)
    model.encode_image(images)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        model.encode_image(images)
    finally:
        torch.set_float32_matmul_precision(before)
    model.encode_image(images)
    assert len(recorded) == 2


def test_recordings_do_not_keep_a_model_nor_travel_with_it(model, device, monkeypatch):
    model.encode_image(make_images(SIZES, 1).to(device))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other not in graphs._models
    if device == "cpu":  # CUDA's recordings do not hold the function
        monkeypatch.setattr(graphs, "record", lambda function, *_: graphs.Recording(lambda: None, function(), 1))
    short = _make(device)
    short.encode_text(_texts(3).to(device))
    short.encode_image(make_images(SIZES, 1).to(device))
    gone = weakref.ref(short)
    del short
    gc.collect()
    assert gone() is None


def test_a_refused_input_leaves_no_recording(model, device):
    with pytest.raises(ValueError, match="images are 8 x 8, but the model wants 16 x 16"):
        model.encode_image(torch.zeros(1, 3, 8, 8, device=device))
    assert not graphs._models[model].entries
    images = make_images(SIZES, 1).to(device)
    assert torch.equal(model.encode_image(images), _without(model, lambda: model.encode_image(images)))


def test_threads_share_the_recordings_of_a_model(monkeypatch):
    """However long the first of them takes to make the place for them."""

    class Slow(graphs.Graphs):
        def __init__(self):
            time.sleep(0.05)
            super().__init__()

    monkeypatch.setattr(graphs, "Graphs", Slow)
    model = torch.nn.Linear(1, 1)
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: graphs._graphs_of(model), range(8))]
    assert len(set(map(id, found))) == 1 and graphs._graphs_of(model) is found[0]


class MockedCuda:
    """In the place of torch.cuda, while `record` runs: notes what is called, and keeps account of reserved memory."""

    def __init__(self):
        self.calls, self.cached, self.used = [], 5000, 1000

    def __getattr__(self, name):
        return lambda *arguments, **options: self.calls.append(name)

    def memory_reserved(self, device):
        self.calls.append("memory_reserved")
        return self.cached + self.used

    def empty_cache(self):
        self.calls.append("empty_cache")
        self.cached = 0

    def current_stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def stream(self, side):
        yield

    @contextlib.contextmanager
    def graph(self, graph, **options):
        # as PyTorch's own, which empties the cache before it captures
        self.empty_cache()
        self.calls.append("begin")
        yield
        self.calls.append("end")

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)


def test_a_recording_counts_its_own_memory_and_has_a_workspace_of_its_own(monkeypatch):
    """With torch.cuda mocked: the cache is emptied before its size is read, and cuBLAS forgets its memory around it."""
    cuda = MockedCuda()
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    monkeypatch.setattr(compat, "clear_cublas_workspaces", lambda: cuda.calls.append("clear"))

    def launch():
        cuda.calls.append("launch")
        cuda.used += 700 if "begin" in cuda.calls else 0
        return torch.zeros(1)

    made = graphs.record(launch, torch.device("cuda"), None, SimpleNamespace(wait_stream=lambda other: None))
    assert made.n_bytes == 700, "and none of the 5000 that were only kept for later"
    assert cuda.calls[:2] == ["launch"] * 2
    around = [call for call in cuda.calls if call in ("clear", "begin", "launch", "end")][2:]
    assert around == ["clear", "begin", "launch", "end", "clear"]


def test_what_suits(device):
    """On a GPU; what else is asked of a call is the same on every device."""
    model, images = _make(device), torch.zeros(1, 3, 16, 16, device=device)
    with torch.no_grad(), clipfast.backend("triton"):
        assert graphs.suit(model, images) is (device != "cpu")
        assert graphs._suits(model, images) and not graphs._suits(model, images[:0])
        with torch.enable_grad():
            assert not graphs._suits(model, images)
        with torch.autocast(device, torch.bfloat16):
            assert not graphs._suits(model, images)
        with clipfast.backend("torch"):
            assert not graphs._suits(model, images)


def test_the_recording_used_longest_ago_goes_first(model, device, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    for batch in (1, 2, 1, 3):
        model.encode_image(make_images(SIZES, batch).to(device))
    assert [key[1][0] for key in graphs._models[model].entries] == [1, 3]


@pytest.mark.parametrize("shortest", [1, 8, 77])
@pytest.mark.parametrize("batch", [1, 33, 256, 1000])
def test_few_sizes_serve_all_batches_with_little_filling(batch, shortest):
    """Whatever the captions' lengths: at most 6 % more rows where there are many, and each size has one shape."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[int, set[int]] = {}
    for _ in range(50):
        lengths = torch.randint(shortest, 78, (batch,), generator=generator)
        total, fillers = int(lengths.sum()), filling(int(lengths.sum()))
        filled = total + sum(fillers)
        assert min(fillers) > 0 and max(fillers) <= 77 and filled % 16 == 0
        assert sum(fillers) <= max(16, 0.06 * total)
        shapes.setdefault(filled, set()).add(len(fillers))
    assert len(shapes) <= 20 and all(len(counts) == 1 for counts in shapes.values())


@pytest.mark.parametrize("lengths", [(3,), (12, 1, 5), (8, 8), (4, 12)])
def test_stable_rows_are_filled_up(lengths):
    text = _texts(*lengths)
    plain, filled = pack_text(text, 12, VOCABULARY), pack_text(text, 12, VOCABULARY, stable=True)
    total = sum(lengths)
    assert filled.rows.total == len(filled.ids) == len(filled.positions) and filled.rows.total % 16 == 0
    assert total < filled.rows.total <= total + 16, "there is always a filling, so the number of sequences is one more"
    assert filled.rows.lengths[:-1] == plain.rows.lengths and filled.rows.stable
    assert torch.equal(filled.ids[:total], plain.ids) and torch.equal(filled.positions[:total], plain.positions)
    assert torch.equal(filled.last[:-1], plain.last) and torch.equal(filled.restore, plain.restore)
