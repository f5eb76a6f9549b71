"""Launches of `make gpu` by what they are compiled from: known without compiling, kept out where they are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import launch_ids
from benchmarks.gpu.run import Run, State

pytest.importorskip("triton.knobs", reason="launches can be seen since Triton 3.4")

ROOT = Path(__file__).resolve().parents[1]
# where kernels are compiled, and not interpreted; tensors without memory, and an architecture that is not here
START = """
import dataclasses, functools, torch, triton
from benchmarks import compilation
from benchmarks.gpu import launch_ids, problems as make
from clipfast import tuning

META = torch.device("meta")
M = make.Maker(META, torch.bfloat16)
WIDE = tuning.LinearConfig(128, 256, 64, warps=8, stages=3, persistent=True)

def call(config=WIDE, rows=1600, activation="quick_gelu"):
    case = make.linear("", rows, 3072, 768, 1, M, activation, False).make()
    return functools.partial(make.run_linear, case, config)

def ids(*arguments):
    return [launch.id for launch in launch_ids.launches_of(call(*arguments), META)]
"""


def compiled(script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", START + script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_id_is_of_the_configuration_and_not_of_the_shape():
    script = """
first = ids()
assert len(first) == 1 and first == ids() == ids(WIDE, 12800)
assert "_linear_persistent_kernel" in launch_ids.launches_of(call(), META)[0].name
others = [ids(dataclasses.replace(WIDE, **{name: value}))[0] for name, value in
          (("warps", 4), ("stages", 4), ("block_n", 128), ("group_m", 16), ("fast_tanh", True))]
others += ids(WIDE, 1600, None)
assert len({*first, *others}) == 7
# a split sum is two kernels
assert len(ids(tuning.LinearConfig(16, 32, 128, warps=4, stages=4, split_k=2), 9)) == 2
# another kernel's source
launch_ids._source.cache_clear()
launch_ids._source = lambda module, kernel: "changed"
assert ids() != first
print(first[0])
"""
    # and the same in another process
    assert compiled(script) == compiled(script)


def test_what_is_condemned_is_not_launched_and_the_rest_is():
    script = """
bad, good = launch_ids.launches_of(call(), META)[0], dataclasses.replace(WIDE, stages=4)
triton.runtime.driver.set_active(compilation.Driver(90))
launch_ids.forbid({bad.id: "row 3 is wrong"})
from triton import knobs
look, seen = knobs.runtime.jit_cache_hook, []
def hook(**known):
    look(**known)
    seen.append(known["fn"].name)
    return True  # not compiled
knobs.runtime.jit_cache_hook = hook
call(good)()
assert len(seen) == 1
try:
    call()()
except launch_ids.Condemned as why:
    print(why)
assert len(seen) == 1
# looking what a call would launch lifts no ban
assert launch_ids.launches_of(call(), META)[0].id == bad.id and knobs.runtime.jit_cache_hook is hook
"""
    assert compiled(script) == "_linear_persistent_kernel: row 3 is wrong\n"


def test_an_operator_that_would_launch_it_goes_to_pytorch(monkeypatch):
    """As on a GPU where launches can be seen; here the kernel that is forbidden raises by itself."""
    import clipfast
    from clipfast.kernels import fused

    def forbidden(*arguments):
        raise launch_ids.Condemned("_linear_fwd_kernel: row 3 is wrong")

    monkeypatch.setattr(launch_ids, "can_see", lambda: True)
    monkeypatch.setattr(launch_ids, "forbid", lambda wrong: None)
    monkeypatch.setattr(fused, "TRITON", {**fused.TRITON, "linear": forbidden})
    monkeypatch.setattr(clipfast.dispatch, "_decisions", {})
    run = Run("towers", State(dry=True, wrong={"id": "row 3 is wrong"}), torch.device("cpu"), lambda kind, value: None)
    said = launch_ids.fall_back(run)
    x, weight, bias = torch.randn(5, 32), torch.randn(16, 32), torch.randn(16)
    with torch.no_grad(), clipfast.backend("triton"):
        y = clipfast.ops.linear(x, weight, bias)
        clipfast.ops.layer_norm(x, weight[0], weight[1])
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    assert said() == ["linear on PyTorch, since _linear_fwd_kernel: row 3 is wrong"] and said() == []


def test_nothing_is_replaced_where_nothing_is_wrong(monkeypatch):
    from clipfast.kernels import fused

    before = dict(fused.TRITON)
    monkeypatch.setattr(launch_ids, "can_see", lambda: True)
    launch_ids.fall_back(Run("towers", State(dry=True), torch.device("cpu"), lambda kind, value: None))
    assert before == fused.TRITON


def test_what_passed_elsewhere_is_not_to_blame():
    events = []
    run = Run("gate", State(right=["a"]), torch.device("cpu"), lambda kind, value: events.append((kind, value)))
    run.prove("", "check", ["b"])
    run.fail("wrong", ["a", "b", "c"])
    assert run.wrong == {"c": "wrong"}
    run.fail("wrong too", ["a", "b"])
    assert run.wrong == {"a": "wrong too", "b": "wrong too", "c": "wrong"}
    assert events[1:] == [("wrong", ["wrong", ["c"]]), ("wrong", ["wrong too", ["a", "b"]])]


def test_a_key_is_of_the_check_its_launches_and_the_rules(monkeypatch):
    launch = launch_ids.Launch("a", "linear")
    key = launch_ids.key("check", [launch])
    assert key == launch_ids.key("check", [launch]) and len(key) == 16
    assert (
        len({key, launch_ids.key("check", [launch_ids.Launch("b", "linear")]), launch_ids.key("another", [launch])})
        == 3
    )
    assert launch_ids.key("check", []) == "" and launch_ids.key("check", [], more="source") != ""
    monkeypatch.setattr(launch_ids, "_rules", lambda: "another rule")
    assert launch_ids.key("check", [launch]) != key


def test_the_gate_makes_every_launch_of_the_towers_that_are_timed():
    """On CPU tensors that nothing fills; a launch of a tower that no check makes would be timed unseen."""
    script = """
import json
from unittest import mock
from benchmarks.gpu import checks, tower_launches, problems

problems.Maker.normal = lambda self, *shape, size=1.0: torch.empty(shape, dtype=self.dtype)
problems.Maker.norm = lambda self, width: (torch.empty(width), torch.empty(width))
checks.HALVES = tower_launches.DTYPES = (torch.bfloat16,)
CPU = torch.device("cpu")
with tower_launches.on_triton(), mock.patch.object(launch_ids, "can_see", return_value=True):
    found = compilation.collect(tower_launches.timed(), [90])
    towers = {launch_ids._id(x.module, x.kernel, 90, json.loads(x.specialization)): str(x) for x in found}
    several = [each for each in checks.headline(CPU) if each.operator != "graphs"]
    made = {launch.id for each in several for launch in launch_ids.launches_of(each.prepare().launch, CPU)}
launches = sorted(towers.values())
assert len(set(launches)) == len(launches) > 50
for kernel in ("_linear_persistent_kernel", "_attention_tile_kernel", "_attention_stream_kernel"):
    assert any(line.startswith(f"{kernel} sm_90 bf16") for line in launches), kernel
# captions: causal, of 77 tokens in tiles of 128 rows and of 8 to 24 in smaller ones
causal = [line for line in launches if "IS_CAUSAL=True" in line]
assert any("BLOCK128" in line for line in causal) and any("BLOCK32" in line for line in causal)
print([name for id, name in towers.items() if id not in made])
"""
    assert compiled(script) == "[]\n"


def test_every_configuration_is_checked():
    """Every tile of every kernel that benchmarks/launches.py launches, for an sm_90, in bfloat16 and float32."""
    script = """
from benchmarks import launches
from benchmarks.gpu import checks, tower_launches

def tiles(cases):
    return {(x.kernel, x.types, x.tile) for x in compilation.collect(cases, [90])}

CPU = torch.device("cpu")
launches.DTYPES = checks.DTYPES = (torch.bfloat16, torch.float32)
launches.PRECISIONS = ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True))
wanted = tiles(launches.CASES.values())
with tower_launches.on_triton(), make.unfilled():
    several = [x for x in checks.checks(CPU) if x.operator != "graphs" and not x.more]
    found = tiles(x.prepare().launch for x in several)
print(len(wanted) > 150, sorted(wanted - found))
"""
    # the loss's products are in half precision on a GPU alone, and then so are its gradients of the logits
    on_a_gpu = [("_loss_gradients_kernel", "fp32/bf16", "M32 N64 w4 s3")]
    assert compiled(script) == f"True {on_a_gpu}\n"
