"""`clipfast bench` says what it measured: checked before timed, CSV and table agree, nobody is left out in silence."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
import torch

import clipfast
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import ceilings, contest, harness, house, peers, plan, tables, workload
from clipfast.bench.peers import Missing, Peer
from clipfast.cli import main
from clipfast.roofline import Work

from . import peers as installed
from .bench_models import TINY, WORDS

RATES = {"float32": 1e11, "bfloat16": 2e11}
CEILINGS = ceilings.Ceilings({ceilings.COPY: 1e10, **RATES}, dict.fromkeys(RATES, ceilings.PEAK), RATES)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes, quick: CEILINGS)
    # peers of these tests are closures; tests/test_bench_seats.py has processes
    monkeypatch.setattr(house, "apart", lambda device: False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def alone(monkeypatch, *others: Peer):
    """No peers but these."""
    ours = peers.known()[peers.OURS]
    monkeypatch.setattr(peers, "known", lambda: {peer.name: peer for peer in (ours, *others)})


def bench(folder, *more, batch="4", dtypes="float32", minutes="0"):
    # one thread: products this small gain nothing from more, and lose much on a busy machine
    fixed = ["--models", "tiny", "--batch", batch, "--dtypes", dtypes, "--rounds", "3", "--threads", "1", "--no-plots"]
    return main(["bench", *fixed, "--no-start", "--minutes", minutes, "--out", str(folder), "--name", "it", *more])


def rows_of(folder):
    with (folder / "it.csv").open() as file:
        return list(csv.DictReader(file))


def printed(text):
    """{(tower, contestant): median in ms} of the tables in the output."""
    found, tower = {}, None
    for line in text.splitlines():
        if line.startswith("tiny "):
            tower = line.split()[1].rstrip(",")
        name, _, numbers = line.partition("  ")
        if tower and numbers and name not in ("contestant", ""):
            found[tower, name.strip()] = float(numbers.split()[0])
    return found


def known_peers():
    """Contestants of each tower, by what is installed."""
    names = {tower: {"clipfast"} for tower in workload.TOWERS}
    theirs = {
        "openai_clip": ({"openai-clip"}, {"openai-clip"}),
        "open_clip": ({"open_clip"}, {"open_clip"}),
        "transformers_clip": ({"transformers"}, {"transformers, pad 30", "transformers, pad longest"}),
    }
    for load, (image, text) in theirs.items():
        try:
            getattr(installed, load)()
        except pytest.skip.Exception:
            continue
        names["image"] |= image
        names["text"] |= text
    return {(tower, name) for tower in names for name in names[tower]}


EAGER = "clipfast,openai-clip,open_clip,transformers"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_reproduce_the_printed_medians(dtype, tmp_path, capsys):
    assert bench(tmp_path / "new", "--peers", EAGER, dtypes=dtype) == 0
    rows, shown = rows_of(tmp_path / "new"), printed(capsys.readouterr().out)
    timed = {(row["tower"], row["contestant"]): row for row in rows if row["status"] != "missing"}
    assert set(timed) == set(shown) == known_peers()
    for (tower, name), row in timed.items():
        assert row["status"] == "ok" and row["rounds"] == "3" and row["threads"] == "1", row
        assert row["warning"] == "only 3 rounds" and row["version"]
        seconds = [float(value) for value in row["seconds"].split()]
        median = statistics.median(seconds)
        assert float(row["median_s"]) == median and shown[tower, name] == float(f"{median * 1e3:.4g}")
        assert float(row["p20_s"]) <= median <= float(row["p80_s"])
        assert float(row["samples_per_s"]) == pytest.approx(4 / median, rel=1e-5)
        for column, other in (("vs_openai", peers.OPENAI), ("vs_transformers", peers.TRANSFORMERS[tower])):
            if (tower, other) in timed:
                ratio = float(timed[tower, other]["median_s"]) / median
                assert float(row[column]) == pytest.approx(ratio, rel=1e-5)
            else:
                assert row[column] == ""
    whole = json.loads((tmp_path / "new" / "it.json").read_text())
    assert whole["environment"]["cpu"] and whole["options"]["models"] == ["tiny"] and len(whole["rows"]) == len(rows)
    assert whole["clocks"][0]["at"] == "start" and str(tmp_path) not in json.dumps(whole)


def test_rates_are_those_of_the_medians():
    group = plan.Group("tiny", "float32", "image", 4, "")
    rows = {
        "clipfast": {"status": "ok", "median_s": 0.5, "rel_rms": 1e-7},
        "openai-clip": {"status": "ok", "median_s": 1.0, "rel_rms": 4e-7},
        "broken": {"status": "WRONG", "rel_rms": 1.0},
    }
    tables.add_rates(rows, group, 8e10, [Work(4 * 10**10, 0, 0), Work(0, 10**9, 0)], CEILINGS)
    ours = rows["clipfast"]
    assert (ours["samples_per_s"], ours["vs_openai"], ours["rms_vs_openai"]) == (8, 2, 0.25)
    assert (ours["gflop_per_sample"], ours["gflops"], ours["share_of_ceiling"]) == (20, 160, 1.6)
    # 0.4 s of products, then 0.1 s of bytes
    assert ours["floor_s"] == 0.5 and ours["of_floor"] == 1
    assert "samples_per_s" not in rows["broken"] and "vs_transformers" not in ours


def test_both_towers_give_logits_that_are_checked(tmp_path):
    assert bench(tmp_path, "--peers", EAGER, "--towers", "both") == 0
    rows = rows_of(tmp_path)
    assert {row["status"] for row in rows} <= {"ok", "missing"} and len([r for r in rows if r["median_s"]]) >= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_ahead_is_a_contestant_of_its_own(dtype, tmp_path):
    assert bench(tmp_path, "--peers", "clipfast,clipfast prepacked", dtypes=dtype) == 0
    rows = [row for row in rows_of(tmp_path) if row["contestant"] == peers.PREPACKED]
    assert [(row["tower"], row["status"]) for row in rows] == [("image", "ok"), ("text", "ok")]
    assert all(row["version"] == clipfast.__version__ for row in rows)


# ---- wrong is not timed ----


def shifting(calls, change, tower="image"):
    """A peer that computes something else."""

    def build(spec):
        prepare = peers.known()[peers.OURS].build(spec)

        def made(asked, batch):
            (right,) = prepare(asked, batch).values()
            return {"shifted": lambda: calls.append(1) or change(right())} if asked == tower else {}

        return made

    return Peer("shifted", "nobody", build)


def test_a_wrong_peer_is_reported_and_not_timed(monkeypatch, tmp_path, capsys):
    calls = []
    alone(monkeypatch, shifting(calls, lambda x: x.roll(1, 0)))
    assert bench(tmp_path) == 0
    assert len(calls) == 1  # the check
    (row,) = (row for row in rows_of(tmp_path) if row["contestant"] == "shifted")
    assert row["status"] == "WRONG" and row["note"].startswith("cos_gap_p99") and not row["median_s"] + row["seconds"]
    assert "shifted (WRONG)" in capsys.readouterr().out
    assert [row["status"] for row in rows_of(tmp_path) if row["contestant"] == "clipfast"] == ["ok", "ok"]


def test_an_approximation_is_timed_and_never_called_equal(monkeypatch, tmp_path, capsys):
    rough = shifting([], lambda x: x + 0.05 * x.roll(1, 1))._replace(approximate=True)
    alone(monkeypatch, rough)
    assert bench(tmp_path) == 0
    (row,) = (row for row in rows_of(tmp_path) if row["contestant"] == "shifted")
    assert row["status"] == "approximate" and row["median_s"] and float(row["rel_rms"]) > 1e-2
    assert "shifted (approximate)" in capsys.readouterr().out


def test_if_ours_is_wrong_the_exit_status_says_so(monkeypatch, tmp_path):
    wrong = shifting([], lambda x: 2 * x)._replace(name=peers.OURS)
    ours = peers.known()[peers.OURS]
    build = wrong._replace(build=lambda spec: lambda tower, batch: {"clipfast": lambda: 2 * real(spec, tower, batch)})

    def real(spec, tower, batch):
        return ours.build(spec)(tower, batch)["clipfast"]()

    monkeypatch.setattr(peers, "known", lambda: {peers.OURS: build})
    assert bench(tmp_path) == 1


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda x: x, "ok"),
        (lambda x: x + 1e-7 * x.roll(1, 0), "ok"),
        (lambda x: x + 0.01 * x.roll(1, 0), "WRONG"),
        (lambda x: 1.01 * x, "WRONG"),  # the cosine alone does not see it
        (lambda x: torch.where(torch.arange(len(x))[:, None] == 50, torch.nan, x), "WRONG"),  # not a checked sample
        (lambda x: torch.where(torch.arange(len(x))[:, None] == 50, x.roll(1, 0), x), "WRONG"),  # nor this
        (lambda x: x[:, :-1], "WRONG"),
        (lambda x: 0 * x, "WRONG"),
    ],
    ids=["same", "rounding", "mixed", "longer", "nan", "one row", "shape", "zeros"],
)
def test_verdict(change, status):
    exact = torch.randn(100, 32, dtype=torch.float64)
    chosen = workload.checked_samples(100)
    assert 50 not in chosen
    truth = contest.Truth(exact[chosen], chosen, 32)
    here = contest.Entry.here
    entries = {"first": here("first", exact.float), "it": here("it", lambda: change(exact.float()))}
    rows = {}
    accepted = contest.check(entries, truth, 100, torch.float32, rows)
    contest.time_accepted(accepted, rows, 1)
    assert rows["first"]["status"] == "ok"
    assert rows["it"]["status"] == status and ("median_s" in rows["it"]) == (status == "ok"), rows


# ---- what goes wrong costs its own row only ----


def raising(name, error, *, when):
    def build(spec):
        if when == "build":
            raise error
        prepare = peers.known()[peers.OURS].build(spec)

        def made(tower, batch):
            if when == "prepare" and tower == "image":
                raise error
            results = iter([prepare(tower, batch)["clipfast"]()] if when == "later" else [])

            def call():
                for result in results:
                    return result
                raise error

            return {name: call} if tower == "image" else {}

        return made

    return Peer(name, "nobody", build)


def test_failures_cost_their_own_row_only(monkeypatch, tmp_path, capsys):
    alone(
        monkeypatch,
        raising("absent", Missing("absent is not installed"), when="build"),
        raising("unbuilt", RuntimeError("no room at /some/where/private"), when="build"),
        raising("early", MemoryError("out of memory"), when="check"),
        raising("late", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), when="later"),
        raising("later", ValueError("no"), when="later"),
        raising("unprepared", ValueError("no such size"), when="prepare"),
    )
    assert bench(tmp_path) == 0
    found = {(row["tower"], row["contestant"]): (row["status"], row["note"]) for row in rows_of(tmp_path)}
    for tower in workload.TOWERS:
        assert found[tower, "absent"] == ("missing", "absent is not installed")
        assert found[tower, "unbuilt"] == ("missing", "not run: RuntimeError: no room at <path>")
        assert found[tower, "clipfast"] == ("ok", "")
    assert found["image", "unprepared"] == ("failed", "ValueError: no such size")
    assert ("text", "unprepared") not in found  # it has no text tower, and was asked all the same
    assert found["image", "early"] == ("out of memory", "MemoryError: out of memory")
    assert found["image", "late"][0] == "out of memory" and found["image", "later"] == ("failed", "ValueError: no")
    assert "absent: absent is not installed" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_a_note(monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip" else found(name))
    assert bench(tmp_path, "--peers", "clipfast,open_clip") == 0
    missing = [row["note"] for row in rows_of(tmp_path) if row["status"] == "missing"]
    assert missing == ["open_clip_torch is not installed"] * 2


def test_a_batch_that_does_not_fit_costs_its_rows_only(monkeypatch, tmp_path):
    alone(monkeypatch)
    assert bench(tmp_path, batch=f"2,{10**9}") == 0
    found = {(row["tower"], row["batch"]): row for row in rows_of(tmp_path)}
    assert found["image", "2"]["status"] == "ok" and found["text", "2"]["status"] == "ok"
    large = found["image", str(10**9)]
    assert large["status"] == "out of memory" and "GiB are free" in large["note"]


def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    alone(monkeypatch)
    timed, interleaved = [], harness.interleaved

    def interrupted(functions, **settings):
        timed.append(1)
        if len(timed) == 4:  # behind a warm-up and two rounds
            raise KeyboardInterrupt
        return interleaved(functions, **settings)

    monkeypatch.setattr(harness, "interleaved", interrupted)
    assert bench(tmp_path) == 130
    (row,) = rows_of(tmp_path)
    assert (row["tower"], row["status"], row["rounds"]) == ("image", "ok", "2")
    assert "interrupted" in capsys.readouterr().out and (tmp_path / "it.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "ViT-B/99"], "ViT-B/99"),
        (["--dtypes", "float8"], "float8"),
        (["--towers", "audio"], "audio"),
        (["--peers", "nobody"], "nobody"),
        (["--captions", "24-8"], "shortest"),
        (["--captions", "80"], "at most 77"),
        (["--captions", "no-such-file.txt"], "no-such-file.txt"),
        (["--batch", "0"], "at least 1"),
        (["--batch", "two"], "two"),
        (["--rounds", "0"], "at least 1"),
        (["--minutes", "-1"], "at least 0"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys, tmp_path):
    assert main(["bench", "--out", str(tmp_path / "new"), *arguments]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(monkeypatch, tmp_path):
    alone(monkeypatch)
    for _ in range(2):
        assert bench(tmp_path, "--towers", "text") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"it.csv", "it.json", "it-2.csv", "it-2.json"}


def test_a_file_of_captions_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(ARCHITECTURES, "tiny", WORDS)
    alone(monkeypatch)
    path = tmp_path / "mine.txt"
    path.write_text("a cat\na dog on a very long leash\n")
    assert bench(tmp_path, "--captions", str(path), "--towers", "text") == 0
    (row,) = rows_of(tmp_path)
    assert row["captions"] == "file mine.txt" and row["mean_length"] == "6.5" and row["status"] == "ok"


def test_what_does_not_fit_is_said_to_be_out_of_time(monkeypatch, tmp_path):
    monkeypatch.setattr(plan.Costs, "call", lambda self, group, peer: 1.0 if group.tower == "image" else 1000.0)
    monkeypatch.setattr(plan.Costs, "once", lambda self, group, peer: {})
    assert bench(tmp_path, "--peers", "clipfast,openai-clip", minutes="2") == 0
    found = {(row["tower"], row["contestant"]): row for row in rows_of(tmp_path)}
    assert found["image", "clipfast"]["status"] == "ok"
    skipped = found["text", "clipfast"]
    assert skipped["status"] == "skipped" and "out of time" in skipped["note"] and not skipped["median_s"]


def test_pictures_are_drawn_from_the_rows(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from clipfast.bench import plots

    alone(monkeypatch)
    assert bench(tmp_path, batch="1,2") == 0
    written = plots.draw(rows_of(tmp_path), CEILINGS.rates, CEILINGS.by, tmp_path / "it")
    assert {path.name for path in written} == {
        f"it-{name}.{kind}" for name in ("throughput", "ratios", "roofline") for kind in ("png", "svg")
    }
    assert all(path.stat().st_size > 1000 for path in written)
    for by, what in ((CEILINGS.by, ceilings.PEAK), ({}, ceilings.PRODUCT)):  # an older file does not say it
        (legend,) = plots.points(rows_of(tmp_path), CEILINGS.rates, by).legends
        assert any(text.get_text().endswith(what) for text in legend.get_texts())
    # where reading was measured, by bytes of weights
    figure = plots.points(rows_of(tmp_path), CEILINGS.rates | {ceilings.READ: 2e10}, CEILINGS.by)
    assert "20 GB/s" in figure.axes[0].get_title() and figure.axes[0].get_xlabel().endswith("of the weights")
    first = (tmp_path / "it-throughput.svg").read_bytes()
    plots.draw(rows_of(tmp_path), CEILINGS.rates, CEILINGS.by, tmp_path / "it")
    assert (tmp_path / "it-throughput.svg").read_bytes() == first
    assert plots.draw([], CEILINGS.rates, CEILINGS.by, tmp_path / "it") == []


def test_train_steps_are_checked_by_their_gradients(monkeypatch, tmp_path):
    installed.openai_clip(), installed.open_clip()
    assert bench(tmp_path, "--peers", EAGER, "--towers", "train", batch="6") == 0
    found = {row["contestant"]: row for row in rows_of(tmp_path)}
    for name in ("openai-clip", "open_clip"):
        assert found[name]["status"] == "ok" and float(found[name]["rel_rms"]) < 1e-5, found[name]
    assert found["transformers"]["status"] == "missing"
    assert found["clipfast"]["status"] in ("ok", "missing")
