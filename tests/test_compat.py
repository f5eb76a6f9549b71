"""clipfast/compat.py: the one file of PyTorch's private names is whole, and true of the PyTorch that is installed."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from clipfast import CLIP, compat, dispatch, doctor, watch

from .tiny_clips import VIT, inputs, randomise

ROOT = Path(__file__).resolve().parents[1]
HERE = "clipfast/compat.py"
# (file, name) of private names that are not PyTorch's, or are more than that
ELSEWHERE = {
    # Triton's, and the only file that touches its interpreter
    *(("clipfast/kernels/interpreter.py", name) for name in ("_get_np_dtype", "_patch_attr")),
    # the standard library's: a process that a GPU holds ends by no other way
    ("benchmarks/gpu/process.py", "_exit"),
    # and one whose CUDA context is lost can run no further test
    ("benchmarks/gpu/pytest_outcomes.py", "_exit"),
    # a contestant of a benchmark: threads that a library left running must not keep its process alive
    ("clipfast/bench/worker.py", "_exit"),
    # set on an object of ours, and a plain attribute of a state dict
    ("clipfast/checkpoints/__init__.py", "_metadata"),
    ("clipfast/checkpoints/layouts.py", "_metadata"),
    # of namedtuple, documented
    *((name, field) for name in ("*",) for field in ("_replace", "_asdict", "_fields")),
}


def _sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> set[str]:
    """Private names that a file defines or assigns itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname for alias in node.names if alias.asname)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            # self.x = ..., and not somebody_elses.x = ...
            names.update({node.attr} if ast.unparse(node.value) in ("self", "cls") else ())
    return set(filter(_is_private, names))


def _used(tree: ast.Module) -> set[str]:
    """Private names that a file takes off something: x._name, getattr(x, "_name"), from x import _name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            parts = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            names.update(part for name in parts for part in name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            names.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return set(filter(_is_private, names))


def test_no_private_name_is_used_outside_the_one_file():
    sources = dict(_sources("clipfast", "benchmarks"))
    ours = set().union(*map(_defined, sources.values()))
    inline = {entry.name.rpartition(".")[2] for entry in compat.PRIVATE if entry.inline}
    found = {
        (path, name)
        for path, tree in sources.items()
        for name in _used(tree) - ours - inline
        if path != HERE and ("*", name) not in ELSEWHERE
    }
    assert found - ELSEWHERE == set()
    # an exception that nobody needs any more
    assert {pair for pair in ELSEWHERE if pair[0] != "*"} <= found


def test_the_guard_sees_each_way_to_a_private_name():
    code = "from torch._ops import a\nimport torch._C\ntorch.x._b\ngetattr(torch, '_c')\ny._d = 1\nself._e = self._f"
    tree = ast.parse(code)
    assert _used(tree) - _defined(tree) == {"_ops", "_C", "_b", "_c", "_d", "_f"}


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


@pytest.mark.parametrize("entry", compat.PRIVATE, ids=lambda entry: entry.name)
def test_a_name_is_there_since_and_until_when_the_list_says(entry):
    here = _release(torch.__version__)
    there = _release(entry.since) <= here and (entry.until is None or here < _release(entry.until))
    assert there == (entry not in compat.missing())


def test_what_is_missing_is_told(monkeypatch):
    assert "_gone" not in doctor.report()
    entry = compat.Private("_C._gone", "is somebody there?", "it is dark")
    monkeypatch.setattr(compat, "PRIVATE", (*compat.PRIVATE, entry))
    assert compat.missing() == [entry]
    (line,) = (line for line in doctor.report().splitlines() if "torch._C._gone" in line)
    assert "it is dark" in line


@pytest.mark.parametrize(
    "gone",
    [
        "_C._functorch.peek_interpreter_stack",
        "_C._len_torch_dispatch_stack",
        "_C._len_torch_function_stack",
        "nn.modules.module._global_forward_hooks",
    ],
)
def test_who_cannot_be_seen_is_taken_to_be_there(gone, monkeypatch):
    assert not watch.looked_at()
    owner, _, name = gone.rpartition(".")
    with monkeypatch.context() as patch:
        patch.delattr(compat.find(owner), name)
        path = Path(compat.__file__)
        blind = importlib.util.module_from_spec(importlib.util.spec_from_file_location("blind", path))
        blind.__spec__.loader.exec_module(blind)
    monkeypatch.setattr(dispatch, "compat", blind)
    monkeypatch.setattr(watch, "compat", blind)
    assert gone in [entry.name for entry in blind.PRIVATE]
    assert watch.looked_at()


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        self.calls: list = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_each_operator():
    clip = randomise(CLIP(*VIT))
    images, _ = inputs(clip.visual.input_resolution)
    with torch.no_grad():
        expected = clip.encode_image(images)
        with Seen() as mode:
            seen = clip.encode_image(images)
    blocks = len(clip.visual.transformer.resblocks)
    assert mode.calls.count(F.multi_head_attention_forward) == blocks
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_a_default_device_looks_at_nothing():
    with torch.device("cpu"):
        assert not dispatch.traced()
        with Seen():
            assert dispatch.traced()
    assert not dispatch.traced()


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_a_hook_on_every_module_is_seen(register):
    assert not watch.looked_at()
    handle = register(lambda *_: None)
    try:
        assert watch.looked_at()
    finally:
        handle.remove()
    assert not watch.looked_at()
