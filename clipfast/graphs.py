"""CUDA graphs: a tower's hundred launches recorded once and replayed as one.

A CPU may need longer to launch a tower's kernels than a GPU to run them. So encode_image and encode_text, without
gradients, record their launches the first time they see a shape and replay them from then on: the same kernels in the
same order, hence the same numbers. The kernels of a batch with more than MAX_ACTIVATIONS bytes of activations are
launched one by one: the GPU is busy with each for longer than the next takes to launch. `model.cuda_graphs = False`
turns it off.

A graph reads its inputs, the model's weights and the plans of its attention by address. Inputs and plans are copied to
where it reads them; weights edited in place are seen; weights that are elsewhere now, or lie there in another way
(`.to`, `.data = `), discard the graphs.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from clipfast import compat, dispatch
from clipfast.packing import PackedText, Rows, map_tensors
from clipfast.watch import parameters_of, plain

if TYPE_CHECKING:
    from clipfast.model import CLIP

# of one batch: what a block holds at once, ten times its input (normalised, queries, keys and values, the MLP's hidden)
MAX_ACTIVATIONS = 1 << 30
ACTIVATIONS = 10
# of one model, over all its graphs. Past the first the one that was used longest ago goes; past the second, or past an
# eighth of the GPU's memory, all go, since they share it, and recording starts anew.
MAX_GRAPHS = 64
MAX_BYTES = 4 << 30


class Recording(NamedTuple):
    replay: Callable[[], Any]
    output: Tensor
    n_bytes: int  # of device memory that it holds


def record(function: Callable[[], Tensor], device: torch.device, pool: Any, side: Any) -> Recording:
    """Runs function twice, which compiles and loads what it launches, then captures its launches.

    pool, side: memory and stream of all recordings of a model. What one frees belongs to its stream, and serves another
                in that stream alone.
    """
    current = torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    current.wait_stream(side)
    # torch.cuda.graph empties the cache too, and what it frees is not to be counted
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(device)
    # cuBLAS keeps its workspace from call to call: that of the capture belongs to the graph's memory, and no other does
    compat.clear_cublas_workspaces()
    # thread_local: what other threads do on the GPU meanwhile is no error
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        output = function()
    compat.clear_cublas_workspaces()
    return Recording(graph.replay, output, torch.cuda.memory_reserved(device) - before)


class Entry(NamedTuple):
    recording: Recording
    inputs: tuple[Tensor, ...]  # what the graph reads
    rows: Rows | None  # keeps the plans that it reads


# CUDA captures for one thread of a process at a time
_one_at_a_time = threading.Lock()
# of a parameter: its address, and how its numbers lie there
_PLACE = (Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype"))


class Graphs:
    """The recordings of one model."""

    def __init__(self) -> None:
        self.entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self.makers: dict[Hashable, dict[Hashable, Callable[[Rows], Any]]] = {}
        self.places: dict[str, list[list[Any]]] = {}
        self.lock = threading.Lock()
        self.discard()

    def discard(self) -> None:
        self.entries.clear()
        self.makers.clear()
        self.n_bytes = 0
        self.pool: Any = None
        self.stream: Any = None
        self.replayed: Any = None  # the event after the last replay

    def follow(self, tower: str, *modules: nn.Module) -> None:
        """Discards the recordings if a parameter of a tower's modules is no longer where and how they read it.

        modules: found to be as they were made (`clipfast.watch`), so that their records name everything inside.
        """
        parameters = [
            parameter
            for module in modules
            for several in parameters_of(module)
            for parameter in several.values()
            if parameter is not None
        ]
        places = [[*map(ask, parameters)] for ask in _PLACE]
        if places != self.places.setdefault(tower, places):
            self.discard()
            self.places = {tower: places}

    def add(
        self, key: Hashable, function: Callable[[], Tensor], inputs: tuple[Tensor, ...], rows: Rows | None
    ) -> Entry:
        device = inputs[0].device
        if self.n_bytes >= _most_bytes(device):
            self.discard()
        while len(self.entries) >= MAX_GRAPHS:
            self.entries.popitem(last=False)
        if self.pool is None and device.type == "cuda":
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        with _one_at_a_time:
            recording = record(function, device, self.pool, self.stream)
        entry = self.entries[key] = Entry(recording, inputs, rows)
        self.n_bytes += entry.recording.n_bytes
        return entry

    def replay(self, entry: Entry) -> Tensor:
        """A copy of the output, since the next replay overwrites it."""
        device = entry.inputs[0].device
        entry.recording.replay()
        output = entry.recording.output.clone()
        if device.type == "cuda":
            self.replayed = torch.cuda.current_stream(device).record_event()
        return output

    def wait(self, device: torch.device) -> None:
        """All graphs share memory, so a replay on another stream waits for the one before."""
        if self.replayed is not None:
            torch.cuda.current_stream(device).wait_event(self.replayed)


def _most_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return MAX_BYTES
    return min(MAX_BYTES, torch.cuda.get_device_properties(device).total_memory // 8)


_models: weakref.WeakKeyDictionary[nn.Module, Graphs] = weakref.WeakKeyDictionary()


_models_lock = threading.Lock()


def _graphs_of(model: nn.Module) -> Graphs:
    found = _models.get(model)
    if found is None:
        with _models_lock:
            found = _models.get(model) or Graphs()
            _models[model] = found
    return found


def suit(model: CLIP, x: Tensor) -> bool:
    """Whether calls like this may be replayed; their rows are then made stable, replayed or not."""
    return x.device.type == "cuda" and not torch.cuda.is_current_stream_capturing() and _suits(model, x)


def _suits(model: CLIP, x: Tensor) -> bool:
    # a replica of nn.DataParallel has no parameters, and is made anew for each call
    if not (plain(x) and vars(model)["_parameters"] and fits(model, x)):
        return False
    if torch.is_grad_enabled() or dispatch.traced() or torch.is_autocast_enabled(x.device.type):
        return False
    # PyTorch's own attention runs sequence by sequence: its launches depend on the lengths
    return dispatch.runs_on("triton", ("attention", "attention_pool"), x.device, model.dtype)


def fits(model: CLIP, x: Tensor) -> bool:
    """Whether images [B, 3, H, W] or texts [B, L] hold anything, and no more than MAX_ACTIVATIONS."""
    if x.ndim == 4:
        positions = getattr(model.visual, "positional_embedding", None)  # of a ResNet there are no graphs
        rows, width = (len(x) * len(positions), positions.shape[-1]) if isinstance(positions, Tensor) else (0, 0)
    else:
        rows, width = x.numel(), model.transformer.width
    return 0 < rows * width * model.dtype.itemsize * ACTIVATIONS <= MAX_ACTIVATIONS


def _setting(device: torch.device) -> Hashable:
    """What outside the arguments decides which kernels run."""
    allowed = torch.backends.cuda.matmul
    return (
        device,
        dispatch.forced(),
        compat.allows_tf32(),
        allowed.allow_fp16_reduced_precision_reduction,
        allowed.allow_bf16_reduced_precision_reduction,
        getattr(allowed, "allow_fp16_accumulation", False),  # since PyTorch 2.7
    )


def _kept(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that may be written to in any mode, though the caller's be inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x)


def encode_image(model: CLIP, images: Tensor) -> Tensor:
    """model.visual(images), replayed.

    images: [B, 3, H, W] on the model's device.   Returns: [B, E].
    """
    graphs = _graphs_of(model)
    with graphs.lock:
        graphs.wait(images.device)
        graphs.follow("image", model.visual, model.visual.transformer)
        key = ("image", images.shape, images.dtype, _setting(images.device))
        entry = graphs.entries.get(key)
        if entry is None:
            static = _kept(images, images.device)
            rows = Rows.fixed(len(images), len(model.visual.positional_embedding))
            entry = graphs.add(key, lambda: model.visual(static), (static,), rows)
        else:
            graphs.entries.move_to_end(key)
            entry.inputs[0].copy_(images)
        return graphs.replay(entry)


def encode_text(model: CLIP, packed: PackedText) -> Tensor:
    """model.encode_packed(packed), replayed.

    packed: on the CPU, its rows stable.   Returns: [B, E].
    """
    device = model.positional_embedding.device
    graphs = _graphs_of(model)
    shape = ("text", len(packed.ids), len(packed.restore), _setting(device))
    with graphs.lock:
        graphs.wait(device)
        graphs.follow("text", model, model.transformer)
        makers = graphs.makers.get(shape)
        if makers is not None:
            plans = [make(packed.rows) for make in makers.values()]
            key = (shape, _constants(plans))
            entry = graphs.entries.get(key)
            if entry is not None:
                graphs.entries.move_to_end(key)
                for static, fresh in zip(entry.inputs, (*packed.tensors, *_tensors(plans)), strict=True):
                    static.copy_(fresh, non_blocking=True)
                return graphs.replay(entry)
        return _add_text(graphs, model, packed, shape, device)


def _add_text(graphs: Graphs, model: CLIP, packed: PackedText, shape: Hashable, device: torch.device) -> Tensor:
    static = packed.map(lambda x: _kept(x, device))
    result = model.encode_packed(static)  # the kernels derive their plans from the rows
    if "runs" in vars(packed.rows):
        # something went sequence by sequence after all, such as PyTorch's attention for heads that the kernels refuse:
        # its launches are those of these lengths, and a recording would be wrong for others
        return result
    makers = dict(packed.rows.makers)
    plans = [packed.rows.derive(key, make, device) for key, make in makers.items()]
    inputs = (*static.tensors, *_tensors(plans))
    entry = graphs.add((shape, _constants(plans)), lambda: model.encode_packed(static), inputs, packed.rows)
    graphs.makers[shape] = makers
    return graphs.replay(entry)


def _tensors(plans: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for plan in plans:
        map_tensors(plan, found.append)
    return found


def _constants(plans: Sequence[Any]) -> Hashable:
    """What a plan holds besides the numbers in its tensors is part of the launches."""
    parts = (plan if isinstance(plan, tuple) else (plan,) for plan in plans)
    return tuple(tuple(x.shape if isinstance(x, Tensor) else x for x in each) for each in parts)
