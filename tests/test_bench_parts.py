"""Ceilings, gradients, start-up cost and imports: what a benchmark stands on."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from clipfast import roofline
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import ceilings, environment, peers, run, start, tables, training, workload
from clipfast.bench.peers import openai
from clipfast.kernels import cpu_library

from . import peers as installed
from .bench_models import TINY


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)


def test_a_slow_machine_does_not_spend_minutes_on_its_ceiling(monkeypatch):
    calls = []

    def slow(way, device):
        calls.append(way)
        monkeypatch.setattr(ceilings, "SECONDS", -1.0)
        return 2.0

    monkeypatch.setattr(ceilings, "on_device", slow)
    assert ceilings.product_flops_per_s(torch.device("cpu"), torch.float32, 8) == 2 * 8**3 / 2.0
    ways = len(ceilings.products(*ceilings.operands(8, 8, 8, torch.float32)))
    assert len(calls) == ways + 1  # a warm-up of each, and one that counts


def test_readers_of_openai_clip_share_one_model():
    installed.openai_clip()
    spec = peers.Spec(workload.random_weights(TINY), TINY, torch.float32)
    first = openai.shared(spec)
    assert openai.shared(spec._replace(architecture={})) is first
    assert openai.shared(spec._replace(dtype=torch.bfloat16)) is not first
    assert openai.shared(spec._replace(weights=dict(spec.weights))) is not first


def test_ceilings_are_measured_and_plausible(monkeypatch):
    found = ceilings.measure(torch.device("cpu"), ["float32", "bfloat16"], quick=True)
    built = cpu_library.missing() is None
    assert set(found.rates) == {"copy", "float32", "bfloat16"} | ({"read"} if built else set())
    assert min(found.rates.values()) > 1e6
    assert all(found.rates[name] >= found.products[name] > 0 for name in found.products)
    assert set(found.single) == (set(found.products) if built else set())
    assert found.cached >= 0


@pytest.mark.parametrize(("peak", "rate", "by"), [(2e9, 2e9, ceilings.PEAK), (0.0, 1e9, ceilings.PRODUCT)])
def test_a_ceiling_is_what_no_product_passes_and_its_name_is_said(monkeypatch, peak, rate, by):
    """Without the library, or with instructions that its loop does not know, it is the fastest product."""
    monkeypatch.setattr(ceilings, "copy_bytes_per_s", lambda device, n_bytes: 3e9)
    monkeypatch.setattr(ceilings, "product_flops_per_s", lambda device, dtype, size: 1e9)
    monkeypatch.setattr(
        ceilings, "multiply_adds_per_s", lambda dtype, seconds, threads: peak / 2 if threads == 1 else peak
    )
    reading = ceilings.Reading(2 * peak, 1, 0) if peak else None
    monkeypatch.setattr(ceilings, "fastest_reading", lambda n_bytes: reading)
    monkeypatch.setattr(environment, "cache_bytes", lambda: 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = ceilings.measure(torch.device("cpu"), ["float32"])
    more = {"read": 4e9} if peak else {}
    single = {"float32": 1e9} if peak else {}
    assert found == ({"copy": 3e9, **more, "float32": rate}, {"float32": by}, {"float32": 1e9}, single, 5)
    told = {ceilings.PEAK: "2 GFLOP/s (peak of fused multiply-adds, of one thread 1, fastest product 1)"}
    read = "read 4 GB/s, " if peak else ""
    line = f"ceilings: {read}copy 3 GB/s, float32 {told.get(by, '1 GFLOP/s (fastest product measured)')}"
    assert tables.ceilings(found) == line


def test_the_peak_is_measured_in_every_form_that_runs_here(monkeypatch):
    ran = []

    def run(operator, args):
        ran.append((operator, args.dtype, args.instructions))
        ctypes.c_int64.from_address(args.flops).value = args.steps

    monkeypatch.setattr(cpu_library, "missing", lambda: None)
    monkeypatch.setattr(cpu_library, "best", lambda: "avx512")
    monkeypatch.setattr(cpu_library, "run", run)
    assert ceilings.multiply_adds_per_s(torch.bfloat16, 1e-7, 2) > 0
    assert set(ran) == {("peak", 1, code) for code in (1, 2, 3)}
    monkeypatch.setattr(cpu_library, "missing", lambda: "not built")
    assert ceilings.multiply_adds_per_s(torch.float32, 1e-7, 2) == 0


def test_reading_is_of_whole_blocks_in_every_form_and_of_less_where_memory_is_short(monkeypatch):
    ran = []
    monkeypatch.setattr(cpu_library, "missing", lambda: None)
    monkeypatch.setattr(cpu_library, "best", lambda: "avx2")
    monkeypatch.setattr(
        cpu_library, "run", lambda operator, args: ran.append((operator, args.bytes, args.instructions))
    )
    monkeypatch.setattr(environment, "available_bytes", lambda device: 40_000.0)
    assert ceilings.fastest_reading(1 << 30).bytes_per_s > 0
    assert set(ran) == {("read", 9 * 1024, code) for code in (1, 2)}
    monkeypatch.setattr(cpu_library, "missing", lambda: "not built")
    assert ceilings.fastest_reading(1 << 20) is None


def test_a_floor_is_of_weights_where_reading_was_measured():
    works = [roofline.Work(0, 10, 10, weights=5), roofline.Work(40, 0, 0)]
    rates = {"copy": 2.0, "float32": 10.0}
    assert ceilings.Ceilings(rates, {}, {}).floor(works, "float32") == 10 + 4
    assert ceilings.Ceilings(rates | {"read": 0.5}, {}, {}).floor(works, "float32") == 10
    assert ceilings.Ceilings(rates | {"read": 0.5}, {}, {}, {}, 4).floor(works, "float32") == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_seen(dtype):
    installed.openai_clip(), installed.open_clip()
    weights = workload.random_weights(TINY)
    data = workload.inputs(TINY, 4, workload.Captions(8, 24))
    batch = peers.Batch(data["image"], data["text"])
    loss, exact = training.exact_gradients(weights, batch)
    found, missing = training.trainers(peers.Spec(weights, TINY, dtype), ["openai-clip"])
    trainer = found["openai-clip"]
    assert not missing and training.errors(trainer, batch, loss, exact)[1] == ""
    doubled = trainer._replace(loss=lambda *args: 2 * trainer.loss(*args))
    assert "gradient of" in training.errors(doubled, batch, loss, exact)[1]
    before = trainer.model.text_projection.detach().clone()
    trainer.step(batch)
    assert not torch.equal(before, trainer.model.text_projection)


def test_start_is_measured_in_a_process_of_its_own(monkeypatch):
    tiny = "from clipfast.architectures import ARCHITECTURES\nfrom clipfast.bench import start\n"
    tiny += f"ARCHITECTURES['tiny'] = {TINY!r}\n"
    monkeypatch.setattr(start, "CHILD", start.CHILD.replace("from clipfast.bench import start\n", tiny))
    row = start.measure("clipfast", "tiny", "float32", torch.device("cpu"), workload.Captions(8, 24))
    assert row["status"] == "ok", row
    assert row["second_image_s"] > 0 and row["first_text_s"] > 0 and 0 < row["import_s"] < 30
    assert set(row) <= set(run.START_COLUMNS)
    if sys.platform == "linux":
        assert row["peak_bytes"] > row["base_bytes"] > 1 << 20
    wrong = start.measure("nobody", "tiny", "float32", torch.device("cpu"), workload.Captions(8, 24))
    assert wrong["status"] == "failed" and "nobody" in wrong["note"]


def test_importing_clipfast_brings_nothing_slow():
    slow = (
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "triton",
        "matplotlib",
        "transformers",
        "torchvision",
        "tqdm.auto",
    )
    code = "import sys, torch; old = set(sys.modules); import clipfast; print(*sorted(set(sys.modules) - old))"
    # Triton's interpreter, which the tests run under, imports Triton
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain)
    found = done.stdout.split()
    assert "clipfast.model" in found
    assert not [name for name in found if name.startswith(slow)]
    assert not [name for name in found if name.startswith(("clipfast.bench", "clipfast.profiling", "clipfast.demo"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is no interpreter's table")
def test_errors_are_the_corrected_interpreters():
    """As a user runs it: bfloat16 was garbage once clipfast was imported before the interpreter was asked for."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.errors", "--operators", "logits"]
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row[1]: float(row[-1]) for row in map(str.split, done.stdout.splitlines()) if row[0] == "logits"}
    assert set(found) == {"float32", "bfloat16", "float16"} and max(found.values()) <= 1
