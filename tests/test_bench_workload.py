"""The benchmarks say what they measured: checked before timed, CSV and table agree, nobody is left out in silence."""

from __future__ import annotations

import csv
import statistics

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, linear, models, peers, workload
from clipfast import CLIP, convert_weights, reference

from . import peers as installed

TINY = {
    **workload.ARCHITECTURES["ViT-B/32"],
    **{"embed_dim": 32, "image_resolution": 64, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 16},
    **{"context_length": 30, "vocab_size": 99, "transformer_width": 128, "transformer_heads": 2},
    "transformer_layers": 2,
}
TINY_RESNET = {**TINY, "vision_layers": (1, 2, 1, 1), "vision_width": 8, "vision_patch_size": None}
# one thread: products this small gain nothing from more, and lose much on a busy machine
QUICK = ["--models", "tiny", "--quick", "--dtypes", "float32", "--threads", "1"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(workload.ARCHITECTURES, "tiny", TINY)
    monkeypatch.setattr(linear, "ceiling", lambda dtype, quick: 1e11)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ours_alone(monkeypatch):
    """No peers: what a test needs of them it adds."""
    monkeypatch.setattr(peers, "ADAPTERS", {peers.OURS: peers.ADAPTERS[peers.OURS]})


def read(path):
    with path.open() as file:
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


@pytest.fixture(scope="module")
def peers_here():
    """Contestants of each tower, by what is installed."""
    names = {tower: ["clipfast"] for tower in workload.TOWERS}
    theirs = {
        "openai_clip": (["openai-clip"], ["openai-clip"]),
        "open_clip": (["open_clip"], ["open_clip"]),
        "transformers_clip": (["transformers"], ["transformers, pad 30", "transformers, pad longest"]),
    }
    for load, (image, text) in theirs.items():
        try:
            getattr(installed, load)()
        except pytest.skip.Exception:
            continue
        names["image"] += image
        names["text"] += text
    return {(tower, name) for tower in names for name in names[tower]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_reproduce_the_printed_medians(dtype, peers_here, tmp_path, capsys):
    path = tmp_path / "new" / "result.csv"
    assert models.main([*QUICK, "--dtypes", dtype, "--csv", str(path)]) == 0
    rows, shown = read(path), printed(capsys.readouterr().out)
    timed = {(row["tower"], row["contestant"]): row for row in rows if row["status"] != "missing"}
    assert set(timed) == set(shown) == peers_here
    for key, row in timed.items():
        assert row["status"] == "ok" and row["rounds"] == "3" and row["threads"] == "1", row
        seconds = [float(value) for value in row["seconds"].split()]
        assert len(seconds) == 3
        median = statistics.median(seconds)
        assert float(row["median_s"]) == median and shown[key] == float(f"{median * 1e3:.4g}")
        assert float(row["p20_s"]) <= median <= float(row["p80_s"])
        assert float(row["samples_per_s"]) == pytest.approx(4 / median, rel=1e-5)
        assert float(row["gflops"]) == pytest.approx(workload.flops(TINY, key[0]) * 4 / median / 1e9, rel=1e-5)
        assert float(row["share_of_ceiling"]) == pytest.approx(float(row["gflops"]) / 100, rel=1e-5)
        for column, other in (("vs_openai", peers.OPENAI), ("vs_transformers", peers.TRANSFORMERS[key[0]])):
            if (key[0], other) in timed:
                ratio = float(timed[key[0], other]["median_s"]) / median
                assert float(row[column]) == pytest.approx(ratio, rel=1e-5)
            else:
                assert row[column] == ""


def test_wrong_peer_is_reported_and_not_timed(ours_alone, monkeypatch, tmp_path, capsys):
    calls = []

    def shifted(task):
        def call():
            calls.append(1)
            return right().roll(1, 0)

        right = peers._clipfast(task)["image"]["clipfast"]
        return {"image": {"shifted": call}}

    monkeypatch.setitem(peers.ADAPTERS, "shifted", shifted)
    path = tmp_path / "result.csv"
    assert models.main([*QUICK, "--csv", str(path)]) == 0
    assert len(calls) == 1  # the check
    (row,) = (row for row in read(path) if row["contestant"] == "shifted")
    assert row["status"] == "WRONG" and row["note"].startswith("cos_gap_p99") and not row["median_s"] + row["seconds"]
    assert "shifted (WRONG)" in capsys.readouterr().out
    assert [row["status"] for row in read(path) if row["contestant"] == "clipfast"] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda x: x, "ok"),
        (lambda x: x + 1e-7 * x.roll(1, 0), "ok"),
        (lambda x: x + 0.01 * x.roll(1, 0), "WRONG"),
        (lambda x: 1.01 * x, "WRONG"),  # the cosine alone does not see it
        (lambda x: torch.where(torch.arange(len(x))[:, None] == 50, torch.nan, x), "WRONG"),  # not a checked sample
        (lambda x: x[:, :-1], "WRONG"),
        (lambda x: 0 * x, "WRONG"),
    ],
    ids=["same", "rounding", "mixed", "longer", "nan", "shape", "zeros"],
)
def test_verdict(change, status):
    exact = torch.randn(100, 32, dtype=torch.float64)
    output, rows = change(exact.float()), {}
    assert 50 not in workload.checked_samples(100)
    chosen = exact[workload.checked_samples(100)]
    models.contest({"it": lambda: output}, chosen, 100, torch.float32, 1, harness.Progress(1), rows)
    assert rows["it"]["status"] == status and ("median_s" in rows["it"]) == (status == "ok"), rows


def test_missing_peer_is_a_note(ours_alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(peers.ADAPTERS, "open_clip_torch", peers._open_clip)
    monkeypatch.setattr(installed, "_installed", lambda module: module != "open_clip")
    path = tmp_path / "result.csv"
    assert models.main([*QUICK, "--csv", str(path)]) == 0
    rows = [row for row in read(path) if row["status"] == "missing"]
    assert [row["note"] for row in rows] == ["open_clip_torch is not installed"] * 2
    assert "open_clip_torch: open_clip_torch is not installed" in capsys.readouterr().out


def test_failures_cost_their_own_row_only(ours_alone, monkeypatch, tmp_path):
    def cannot_build(task):
        raise RuntimeError("no room at /some/where/private")

    def fails_later(task):
        results = iter([peers._clipfast(task)["image"]["clipfast"]()])

        def call():
            for result in results:
                return result
            raise MemoryError("out of memory")

        return {"image": {"late": call}}

    monkeypatch.setitem(peers.ADAPTERS, "unbuilt", cannot_build)
    monkeypatch.setitem(peers.ADAPTERS, "late", fails_later)
    path = tmp_path / "result.csv"
    assert models.main([*QUICK, "--csv", str(path)]) == 0
    found = {(row["tower"], row["contestant"]): (row["status"], row["note"]) for row in read(path)}
    assert found["image", "unbuilt"] == ("missing", "not run: RuntimeError: no room at <path>")
    assert found["image", "late"] == ("failed", "MemoryError: out of memory")
    assert found["image", "clipfast"] == found["text", "clipfast"] == ("ok", "")


def test_interrupt_keeps_what_was_measured(ours_alone, monkeypatch, tmp_path, capsys):
    timed, interleaved = [], harness.interleaved

    def interrupted(functions, **settings):
        timed.append(1)
        if len(timed) == 3:
            raise KeyboardInterrupt
        return interleaved(functions, **settings)

    monkeypatch.setattr(harness, "interleaved", interrupted)
    path = tmp_path / "result.csv"
    assert models.main([*QUICK, "--csv", str(path)]) == 130
    (row,) = read(path)
    assert (row["tower"], row["status"], row["rounds"]) == ("image", "ok", "2")
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", [TINY, TINY_RESNET], ids=["vit", "resnet"])
def test_flops_are_those_of_openai_clip(architecture):
    model = installed.openai_clip().model.CLIP(**architecture).eval()
    inputs = workload.inputs(architecture, 3, workload.Captions(8, 24))
    for tower, encode in (("image", model.encode_image), ("text", model.encode_text)):
        # the counter has no formula for the CPU's fused attention
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(inputs[tower])
        assert counter.get_total_flops() == 3 * workload.flops(architecture, tower), tower


def test_flops_are_those_of_the_reference():
    weights = workload.random_weights(TINY)
    inputs = workload.inputs(TINY, 3, workload.Captions(8, 24))
    for tower in workload.TOWERS:
        with FlopCounterMode(display=False) as counter:
            getattr(reference, f"encode_{tower}")(weights, inputs[tower])
        assert counter.get_total_flops() == 3 * workload.flops(TINY, tower), tower


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", [TINY, TINY_RESNET], ids=["vit", "resnet"])
def test_rounded_weights_are_those_of_convert_weights(architecture, dtype):
    weights = workload.random_weights(architecture)
    model = CLIP(**architecture)
    model.load_state_dict(weights)
    convert_weights(model, dtype)
    expected = workload.rounded(weights, dtype)
    assert set(expected) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(expected[name], tensor.to(expected[name].dtype)), name


def test_random_weights_leave_nothing_at_its_default():
    for name, tensor in workload.random_weights(TINY_RESNET).items():
        if tensor.numel() > 1:
            assert tensor.unique().numel() > tensor.numel() // 2, name
    first, again, other = (workload.random_weights(TINY, seed)["text_projection"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("captions", ["8-24", "30", "2"])
def test_captions_have_the_lengths_asked_for(captions):
    captions = workload.Captions.parse(captions)
    text = workload.inputs(TINY, 500, captions)["text"]
    lengths = text.argmax(dim=-1) + 1
    assert set(lengths.tolist()) == set(range(captions.shortest, captions.longest + 1))
    for batch in (1, 2, 32):
        few = workload.inputs(TINY, batch, captions)["text"].argmax(dim=-1) + 1
        assert few.double().mean().item() == pytest.approx(sum(captions) / 2, abs=0.5)
    padding = torch.arange(30) >= lengths[:, None]
    assert ((text == 0) == padding).all() and (text[:, 0] == 97).all()
    assert ((text == 98).sum(dim=1) == 1).all()


def test_checked_samples_span_the_batch():
    assert workload.checked_samples(1).tolist() == [0]
    assert workload.checked_samples(3).tolist() == [0, 1, 2]
    chosen = workload.checked_samples(100).tolist()
    assert len(set(chosen)) == workload.CHECKED and chosen[0] == 0 and chosen[-1] == 99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "ViT-B/99"], "ViT-B/99"),
        (["--dtypes", "float8"], "float8"),
        (["--captions", "24-8"], "shortest"),
        (["--captions", "80"], "at most 77"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        models.main(arguments)
    assert message in capsys.readouterr().err


def test_linear_checks_and_writes(tmp_path, capsys):
    path = tmp_path / "linear.csv"
    assert linear.main(["--shapes", "300x512x64,7x64x32", "--rounds", "2", "--csv", str(path)]) == 0
    rows = read(path)
    assert {"F.linear", "clipfast.ops.linear"} <= {row["contestant"] for row in rows}
    assert all(row["status"] == "ok" and row["rounds"] == "2" for row in rows)
    assert all(0 < float(row["rel_rms"]) < 1e-2 for row in rows)
    assert capsys.readouterr().out.count("300x512x64") == sum(row["rows"] == "300" for row in rows)


def test_environment_names_no_person_and_no_place():
    facts = harness.environment()
    assert set(facts) == set(harness.ENVIRONMENT)
    assert not any("/" in str(value) for value in facts.values())
    assert harness.reason(OSError("cannot open /home/me/x.so: no\nmore")) == "OSError: cannot open <path>: no"
