"""On a CPU each contestant has a process of its own, which is stopped while another runs and outlives nobody."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import ceilings, contest, harness, peers, seats, workload
from clipfast.bench.house import House
from clipfast.bench.peers import Batch, Spec, onnx, openvino

from . import peers as installed
from .bench_models import TINY
from .bench_peers import CEILINGS, alone, bench, pids, state, those

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes, quick: CEILINGS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def only(monkeypatch, folder, *names):
    found = those(folder, *names)
    monkeypatch.setattr(peers, "known", lambda: found)


def rows_of(folder):
    with (folder / "it.csv").open() as file:
        return {row["contestant"]: row for row in csv.DictReader(file)}


def gone(found):
    """Whether these processes end; a minute is for a machine that is busy with something else."""
    end = time.monotonic() + 60
    while any(state(pid) for pid in found.values()) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(state(pid) for pid in found.values())


@linux
def test_who_is_asked_runs_alone_and_who_dies_costs_its_own_row_only(monkeypatch, tmp_path, capsys):
    only(monkeypatch, tmp_path, "watches", "watches too", "wrong", "unbuilt", "faults", "exits")
    assert bench(tmp_path) == 0
    found, rows = pids(tmp_path), rows_of(tmp_path)
    assert len({os.getpid(), *found.values()}) == 6 and not any(map(state, found.values()))
    for name in ("watches", "watches too"):
        assert rows[name]["status"] == "ok" and rows[name]["rounds"] == "3"
        lines = (tmp_path / f"{name}.seen").read_text().splitlines()
        # the check; in each of three turns a call that is not timed and one that is
        assert len(lines) == 1 + 3 * 2
        for line in lines:
            pid, threads, states = line.split()
            # on one thread, as asked for; those that are not dead are stopped
            assert (int(pid), threads, set(states)) == (found[name], "1", {"T"})
    assert rows["wrong"]["status"] == "WRONG" and not rows["wrong"]["median_s"]
    words = "its process ended with status 3: no more room in <path>"
    notes = {name: (row["status"], row["note"]) for name, row in rows.items()}
    assert notes["unbuilt"] == ("missing", "unbuilt is not installed")
    assert notes["faults"] == ("failed", "its process was ended by SIGSEGV")
    assert notes["exits"] == ("failed", words) and f"failed: {words}" in capsys.readouterr().out


@pytest.fixture
def house():
    made = House(apart=True)
    yield made
    made.close()


def spec_of(house):
    weights = house.weights(workload.random_weights(TINY), torch.device("cpu"))
    return Spec(weights, TINY, torch.float32)


def batch_of(size):
    data = workload.inputs(TINY, size, workload.Captions(8, 24))
    return Batch(data["image"], data["text"])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="of POSIX")
def test_who_is_killed_for_memory_is_built_again_for_the_next_group(monkeypatch, tmp_path, house):
    spec, peer = spec_of(house), those(tmp_path, "killed")["killed"]
    kills = iter([5, 6, 6])
    monkeypatch.setattr(seats, "_kills_for_memory", lambda: next(kills))

    def prepared():
        (found,) = house.prepare([peer], spec, "image", batch_of(2))
        assert found.built and found.names == ["killed"]
        return found.seat

    seat, first = prepared(), pids(tmp_path)
    assert prepared() is seat and pids(tmp_path) == first
    with pytest.raises(harness.Gone) as caught:
        seat.first("killed")
    row = {"status": "out of memory", "note": "its process was ended by SIGKILL: out of memory"}
    assert contest.failure(caught.value) == row
    with pytest.raises(harness.Gone, match="SIGKILL"):  # and of its other contestants
        seat.turn("killed", 1)
    house.forget(keep=lambda seat: seat.alive)
    assert prepared() is not seat and pids(tmp_path) != first


def test_where_there_is_no_room_nobody_is_built(monkeypatch, tmp_path, house):
    spec = spec_of(house)
    monkeypatch.setattr(seats.environment, "available_bytes", lambda device: 1e6)
    (found,) = house.prepare([those(tmp_path, "wrong")["wrong"]], spec, "image", batch_of(2))
    assert not found.built and not found.seat.alive and not pids(tmp_path)
    row = contest.failure(found.error)
    assert row["status"] == "out of memory" and "GiB are free" in row["note"]


@linux
def test_no_process_is_left_after_an_exception(monkeypatch, tmp_path):
    only(monkeypatch, tmp_path, "watches")
    monkeypatch.setattr(contest, "check", lambda *of: 1 // 0)
    assert bench(tmp_path) == 1
    found = pids(tmp_path)
    assert len(found) == 1 and not any(map(state, found.values()))


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "kill", "kill -9"])
def test_no_process_is_left_when_the_run_is_ended(number, tmp_path):
    """With one process in a call that takes minutes, and others stopped."""
    code = f"import sys; from tests.bench_peers import {alone.__name__}; sys.exit(alone(*sys.argv[1:]))"
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "watches", "waits"],
        cwd=root,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "waits.began").exists():
            assert process.poll() is None
            time.sleep(0.01)
        found = pids(tmp_path)
        assert state(found["watches"]) == "T" and state(found["waits"]) not in ("T", "")
        # to the whole group, as a terminal does
        os.killpg(process.pid, number)
        out = process.communicate(timeout=60)[0]
        assert gone(found)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert ("interrupted" in out) == (number == signal.SIGINT)
    assert number == signal.SIGKILL or not list(tmp_path.glob("clipfast-bench-*"))


# ---- what is made of a model is made once ----


def answers(prepare, name, spec):
    """Of batches of several sizes, beside float64."""
    for size in (1, 3, 2):
        batch = batch_of(size)
        output = prepare("text", batch)[name]()
        exact = workload.exact("text", spec.weights, batch.text, torch.float32)
        yield output.shape, harness.errors(output, exact)["rel_rms"]


def test_onnxruntime_exports_once_for_all_sizes_and_peers(monkeypatch, tmp_path):
    installed.openai_clip()
    for name in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(name)
    exported, export = [], onnx.export
    monkeypatch.setattr(onnx, "export", lambda *of: exported.append(of[1]) or export(*of))
    spec = Spec(workload.random_weights(TINY), TINY, torch.float32, folder=tmp_path)
    found = list(answers(onnx.build(spec, int8=False), onnx.NAME, spec))
    assert [shape for shape, _ in found] == [(size, 32) for size in (1, 3, 2)]
    assert all(error < 1e-5 for _, error in found)
    rough = list(answers(onnx.build(spec, int8=True), onnx.INT8, spec))
    assert all(1e-4 < error < 0.3 for _, error in rough)
    assert exported == ["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text-onnx", "text-onnx-int8"]


def test_an_export_that_fails_leaves_nothing(tmp_path):
    def fails(folder):
        (folder / onnx.GRAPH).write_text("half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        onnx.once(tmp_path / "image-onnx", fails)
    assert not list(tmp_path.iterdir())


def test_openvino_converts_once_for_all_sizes(monkeypatch):
    installed.openai_clip()
    try:
        library = openvino.library()
    except peers.Missing as error:
        pytest.skip(str(error))
    converted, convert = [], library.convert_model
    monkeypatch.setattr(library, "convert_model", lambda *of, **how: converted.append(1) or convert(*of, **how))
    spec = Spec(workload.random_weights(TINY), TINY, torch.float32)
    found = list(answers(openvino.build(spec), openvino.NAME, spec))
    assert [shape for shape, _ in found] == [(size, 32) for size in (1, 3, 2)]
    assert all(error < 1e-5 for _, error in found) and converted == [1]
