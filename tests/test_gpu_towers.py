"""Towers and train steps of `make gpu` without a GPU: who is asked, what is checked, and what an error ends."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import groups, machine, tower_contestants, towers
from benchmarks.gpu.groups import BFLOAT16, SHORT, Group
from benchmarks.gpu.run import COLUMNS, Run
from clipfast.bench import peers, training, workload
from clipfast.bench.budget import Budget
from clipfast.bench.peers import ours

from . import peers as installed
from .gpu_runs import CPU, new_run

OURS, OPENAI = peers.OURS, peers.OPENAI
IMAGE = Group("tiny", "image", 3, torch.float32)
TEXT = Group("tiny", "text", 3, torch.float32, SHORT)


def found(made: Run, tower: str = "image", **wanted) -> dict[str, dict]:
    """Contestant -> row of one tower."""
    rows = [row for row in made.rows if row["operator"] == f"encode_{tower}"]
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert all(set(row) <= set(COLUMNS) for row in rows)
    return {row["contestant"]: row for row in rows}


def named(name: str, change=lambda y: y):
    """A peer that is ours under another name."""

    def build(spec):
        prepare = ours.build(spec)

        def calls(tower, batch):
            (call,) = prepare(tower, batch).values()
            return {name: lambda: change(call())}

        return calls

    return build


@pytest.fixture
def field(monkeypatch):
    """Sets who is asked."""

    def use(**builders):
        builders = {OURS: named(OURS), **builders}
        monkeypatch.setattr(tower_contestants, "builders", lambda run, group: builders)

    return use


# ---- who is asked ----


def test_who_is_compiled_on_a_gpu(monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda"), dry=False)
    group = groups.COMPILED["compiled-text"][0]
    monkeypatch.setattr(peers, "module", lambda *names: None)
    names = list(tower_contestants.builders(gpu, group))
    assert names == [OURS, OPENAI, "openai-clip torch.compile", "openai-clip TensorRT"]
    names = list(tower_contestants.builders(gpu, group._replace(compiled=False)))
    assert {OURS, OPENAI, "open_clip", "transformers", "transformers flash-attn"} <= set(names)
    assert not any("compile" in name or "prepacked" in name for name in names)

    def module(*names):
        raise peers.Missing("openai-clip is not installed")

    monkeypatch.setattr(peers, "module", module)
    assert list(tower_contestants.builders(gpu, group)) == [OURS, OPENAI, "transformers", "transformers torch.compile"]


def test_transformers_is_compiled_for_one_way_of_padding(monkeypatch):
    monkeypatch.setattr(
        tower_contestants.huggingface,
        "build",
        lambda spec, suffix, compiled: (
            lambda tower, batch: {f"transformers, {how}{suffix}": compiled for how in ("pad 77", "pad longest")}
        ),
    )
    calls = tower_contestants._transformers_compiled(None)("text", None)
    assert calls == {"transformers, pad longest torch.compile": {"mode": "max-autotune"}}


def test_a_missing_peer_is_said_once(field):
    def missing(spec):
        raise peers.Missing("absentee is not installed")

    field(absentee=missing)
    made = new_run()
    towers._measure(made, [IMAGE, TEXT, IMAGE._replace(dtype=BFLOAT16)], made.budget)
    towers._measure(made, [TEXT], made.budget)  # another stage
    rows = [row for row in made.rows if row["contestant"] == "absentee"]
    assert [(row["status"], row["note"]) for row in rows] == [("missing", "absentee is not installed")]
    assert made.evidence.notes == ["towers: absentee is missing: absentee is not installed"]
    assert "absentee" not in towers.line(IMAGE, found(made))


def test_weights_and_models_are_made_once(field, monkeypatch):
    built, drawn = [], []
    weights = workload.random_weights

    def build(spec):
        built.append(spec.dtype)
        return named("peer")(spec)

    monkeypatch.setattr(workload, "random_weights", lambda sizes: drawn.append(1) or weights(sizes))
    tower_contestants._weights.cache_clear()
    field(peer=build)
    made = new_run()
    half = [group._replace(dtype=BFLOAT16) for group in (IMAGE, TEXT)]
    towers._measure(made, [IMAGE, IMAGE._replace(batch=2), TEXT, *half], made.budget)
    assert len(drawn) == 1 and built == [torch.float32, BFLOAT16]
    assert [row["status"] for row in made.rows] == ["ok"] * 10 and not made.evidence.notes


@pytest.mark.parametrize("name", [OURS, OPENAI, "open_clip", "transformers"])
def test_models_are_made_on_their_device(name, monkeypatch):
    """Nothing of a model is made on the host; "meta" stands for a GPU, and refuses to be mixed with it."""
    for module in (installed.openai_clip, installed.open_clip, installed.transformers_clip):
        module()
    made: list[torch.nn.Module] = []
    load = torch.nn.Module.load_state_dict

    def seen(self, weights, *args, **kwargs):
        made.append(self)
        assert {x.device.type for x in (*self.parameters(), *self.buffers())} == {"meta"}
        return load(self, {name: tensor.to("meta") for name, tensor in weights.items()}, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", seen)
    weights = workload.random_weights(groups.TINY)
    peers.known()[name].build(peers.Spec(weights, groups.TINY, BFLOAT16, torch.device("meta")))
    assert len(made) == 1


# ---- what an error ends ----


def breaks_at(where: str, calls: list):
    """A peer that raises when it is built, prepared, checked, or timed."""

    def build(spec):
        if where == "build":
            raise RuntimeError("no such luck")

        def prepare(tower, batch):
            if where == "prepare":
                raise RuntimeError("no such luck")

            good = named("broken")(spec)(tower, batch)["broken"]

            def call():
                calls.append(1)
                if where == "check" or (where == "time" and len(calls) > 3):
                    raise RuntimeError("no such luck")
                return good()

            return {"broken": call}

        return prepare

    return build


@pytest.mark.parametrize("where", ["build", "prepare", "check", "time"])
def test_a_contestant_that_raises_leaves_the_others_timed(where, field, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "raise_if_lost", asked.append)
    field(broken=breaks_at(where, []), peer=named("peer"))
    made = new_run()
    towers._measure(made, [IMAGE, TEXT], made.budget)
    assert asked and set(asked) == {CPU}
    rows = found(made)
    assert rows["broken"]["status"] == "failed" and rows["broken"]["note"] == "RuntimeError: no such luck"
    assert "median_s" not in rows["broken"]
    for tower in workload.TOWERS:
        rows = found(made, tower)
        assert rows["peer"]["ours_is_faster"] > 0 and rows[OURS]["rounds"] == 2
    assert not made.evidence.failures  # it is not ours


@pytest.mark.parametrize("where", ["build", "prepare", "check", "time"])
def test_a_lost_gpu_ends_the_stage_and_keeps_what_was_measured(where, field, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    field(broken=breaks_at(where, []), peer=named("peer"))
    made = new_run()
    monkeypatch.setattr(machine, "raise_if_lost", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        towers._measure(made, [IMAGE, TEXT], made.budget)
    rows = found(made)
    assert rows["broken"]["status"] == "failed" and not found(made, "text")
    if where == "time":  # in the second round
        assert rows["peer"]["status"] == rows[OURS]["status"] == "ok" and rows["peer"]["rounds"] >= 1
    elif where == "check":
        assert {*rows} == {"broken"}  # ours is checked last


@pytest.mark.parametrize("function", ["random_weights", "exact"])
def test_a_group_that_cannot_be_checked_ends_alone(function, field, monkeypatch):
    right, calls = getattr(workload, function), []

    def once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(*arguments)

    tower_contestants._weights.cache_clear()
    monkeypatch.setattr(workload, function, once)
    field()
    made = new_run()
    towers._measure(made, [IMAGE, TEXT], made.budget)
    assert made.evidence.notes == [f"towers: {IMAGE.title()} failed: OutOfMemoryError: CUDA out of memory"]
    assert not found(made) and "median_s" in found(made, "text")[OURS]


def test_only_a_lost_gpu_raises_again(monkeypatch):
    """CUDA's calls are stood in for."""

    def broken(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu, waited = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    towers._free(gpu)
    machine.raise_if_lost(CPU)
    assert waited == [gpu]
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    machine.raise_if_lost(CPU)
    for function in (machine.raise_if_lost, towers._free):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            function(gpu)


def test_a_compiler_that_finds_no_end_takes_nobody_with_it(field, monkeypatch):
    def compiles(spec):
        def calls(tower, batch):
            return {"peer torch.compile": lambda: time.sleep(600)}

        return calls

    monkeypatch.setattr(towers, "TIMED_SECONDS", 499)
    field(**{OPENAI: named(OPENAI), "peer torch.compile": compiles})
    made = new_run()
    towers._measure(made, [IMAGE._replace(compiled=True)], made.budget)
    rows = found(made)
    assert rows["peer torch.compile"]["status"] == "failed" and "out of time" in rows["peer torch.compile"]["note"]
    assert "median_s" in rows[OURS] and "median_s" in rows[OPENAI] and not made.evidence.failures


def test_a_wrong_row_that_is_no_sample_is_seen():
    torch.manual_seed(0)
    group = IMAGE._replace(batch=100)
    exact = torch.randn(group.batch, 8, dtype=torch.float64)
    samples = workload.checked_samples(group.batch)
    missed = next(i for i in range(group.batch) if i not in samples)
    wrong = exact.float()
    wrong[missed] = wrong[missed].roll(1)
    made, rows = new_run(), {}
    calls = {OURS: lambda: wrong, OPENAI: lambda: exact.float()}
    assert [*towers.check(made, group, calls, exact[samples], rows)] == [OPENAI]
    assert [*rows] == [OURS, OPENAI] and rows[OURS]["note"].startswith(f"row {missed} is not that of {OPENAI}")


def test_what_computes_the_wrong_thing_has_no_time(field, monkeypatch):
    field(
        **{OURS: named(OURS, lambda y: y.roll(1, 0)), "peer": named("peer"), "nan": named("nan", lambda y: y / 0 * 0)}
    )
    for group in (IMAGE, IMAGE._replace(compiled=True)):
        made = new_run()
        towers._measure(made, [group], made.budget)
        rows = found(made)
        for name in (OURS, "nan"):
            assert rows[name]["status"] == "WRONG" and rows[name]["note"] and "median_s" not in rows[name]
        # ours by other ways is tried then
        for name in ("peer", "clipfast, graphs off", "clipfast, torch backend"):
            assert rows[name]["status"] == "ok" and rows[name]["rounds"] == 2
        assert len(made.evidence.failures) == 1 and IMAGE.title() in made.evidence.failures[0]


def test_time_that_is_too_short_is_said_and_the_first_is_tried(field):
    clock = SimpleNamespace(now=0.0)
    budget = Budget(10, lambda: clock.now)

    def slow(spec):
        clock.now += 9.5  # far more than was planned
        return named("peer")(spec)

    field(peer=slow)
    made = new_run(dry=False)
    small = [group._replace(batch=2) for group in (IMAGE, TEXT)]
    towers._measure(made, [*small, TEXT], budget)
    assert "peer" in found(made) and not found(made, "text")
    (note,) = made.evidence.notes
    assert note == f"towers: out of time before 2 of 3: {small[1].title()}; {TEXT.title()}"


# ---- compilers and train steps ----


def test_a_compiler_is_timed_beside_ours_and_eager(field, monkeypatch):
    installed.openai_clip()
    from clipfast.bench.peers import compiled, openai

    calls = []

    def backend(graph, inputs):
        calls.append("compiled")
        return graph.forward

    name = "openai-clip torch.compile"
    field(**{OPENAI: openai.build, name: lambda spec: compiled.build(spec, name, backend=backend)})
    made = new_run()
    towers._measure(made, [IMAGE._replace(compiled=True), TEXT._replace(compiled=True)], made.budget)
    assert len(calls) == 2
    for tower in workload.TOWERS:
        rows = found(made, tower)
        assert [*rows] == [OURS, OPENAI, name] and {row["status"] for row in rows.values()} == {"ok"}
        assert all(row["rounds"] == 2 and row["vs_eager"] for row in rows.values())


def test_a_dry_run_goes_through_every_path_and_finds_nothing_wrong():
    for module in (installed.openai_clip, installed.open_clip, installed.transformers_clip):
        module()
    made = new_run()
    towers.stage(made, made.budget)
    for tower, others in (("image", {"transformers"}), ("text", {"transformers, pad 77", "transformers, pad longest"})):
        for dtype in ("float32", "bfloat16"):
            rows = found(made, tower, dtype=dtype)
            assert {OURS, OPENAI, "open_clip", *others} <= set(rows)
            assert {row["status"] for row in rows.values()} == {"ok"} and all(row["seconds"] for row in rows.values())
    for name, tower in (("compiled-image", "image"), ("compiled-text", "text"), ("compiled-l14", "image")):
        made.rows.clear()
        towers.compiled(made, made.budget, groups.COMPILED[name])
        assert {*found(made, tower)} == {OURS, OPENAI}
    assert made.evidence.notes == ["towers: dry run: torch.compile is left out"] * 3 and not made.evidence.failures


def test_train_steps_are_checked_by_their_gradients(monkeypatch):
    for module in (installed.openai_clip, installed.open_clip):
        module()
    trainers = training.trainers

    def one_wrong(spec, names):
        made, missing = trainers(spec, names)
        right = made["open_clip"]
        made["open_clip"] = right._replace(loss=lambda *features: 2 * right.loss(*features))
        return made, missing

    monkeypatch.setattr(training, "trainers", one_wrong)
    made = new_run()
    towers.train(made, made.budget)
    rows = {row["contestant"]: row for row in made.rows}
    assert {row["operator"] for row in made.rows} == {"train_step"} and {*rows} == {OURS, OPENAI, "open_clip"}
    assert rows["open_clip"]["status"] == "WRONG" and "gradient" in rows["open_clip"]["note"]
    assert "median_s" not in rows["open_clip"] and rows[OURS]["captions"] == "8-24"
    assert rows[OURS]["dtype"] == "bfloat16" and 0 < rows[OURS]["rel_rms"] < training.BOUNDS[BFLOAT16]
    assert rows[OPENAI]["ours_is_faster"] > 0 and rows[OURS]["vs_eager"] > 0 and not made.evidence.failures


def test_a_train_step_without_peers_is_still_timed(monkeypatch):
    def module(name, distribution):
        raise peers.Missing(f"{distribution} is not installed")

    monkeypatch.setattr(peers, "module", module)
    monkeypatch.setattr(training.openclip, "module", module)
    made = new_run()
    towers.train(made, made.budget)
    rows = {row["contestant"]: row for row in made.rows}
    assert rows[OURS]["status"] == "ok" and rows[OURS]["median_s"] > 0
    assert rows[OPENAI]["status"] == rows["open_clip"]["status"] == "missing" and len(made.evidence.notes) == 2
