"""What is measured is what is said: seeded weights and inputs, caption lengths, the exact answer, the machine."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import attention, linear
from clipfast import CLIP, convert_weights, reference
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import environment, harness, peers, plan, workload
from clipfast.bench.exact import Exact
from clipfast.kernels import cpu_attention, cpu_library, cpu_linear
from clipfast.tokenizer import tokenize

from .bench_models import TINY, TINY_RESNET, WORDS


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


def test_linear_checks_and_writes(tmp_path, capsys):
    path = tmp_path / "linear.csv"
    assert linear.main(["--shapes", "300x512x64,7x64x32", "--rounds", "2", "--csv", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert "F.linear" in {row["contestant"] for row in rows}
    assert cpu_library.missing() or "clipfast" in {row["contestant"] for row in rows}
    # few rows are timed four times as often
    assert all(row["status"] == "ok" and row["rounds"] == ("2" if row["rows"] == "300" else "8") for row in rows)
    assert all(0 < float(row["rel_rms"]) < 1e-2 for row in rows)
    assert "512x64, 300 rows" in capsys.readouterr().out


@pytest.mark.skipif(cpu_library.missing() is not None, reason="libclipfast_cpu is not built")
def test_linear_takes_the_form_asked_for(monkeypatch, capsys):
    forms = set()
    plain = cpu_linear.linear
    monkeypatch.setattr(cpu_linear, "linear", lambda *of: forms.add(of[5]) or plain(*of))
    assert linear.main(["--shapes", "7x64x32", "--rounds", "1", "--instructions", "baseline"]) == 0
    assert forms == {"baseline"}
    with pytest.raises(SystemExit):
        linear.main(["--instructions", "sse9"])
    assert "invalid choice: 'sse9'" in capsys.readouterr().err


@pytest.mark.skipif(cpu_library.missing() is not None, reason="libclipfast_cpu is not built")
def test_attention_checks_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "SHAPES", [attention.Shape("some captions", (3, 5, 5), 2, True)])
    path = tmp_path / "attention.csv"
    assert attention.main(["--rounds", "2", "--csv", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contestant"] for row in rows] == ["torch", "cpu"] * 2
    assert all(row["rounds"] == "2" and 0 < float(row["rel_rms"]) < 1e-2 for row in rows)
    assert capsys.readouterr().out.count("some captions") == 4
    monkeypatch.setattr(cpu_attention, "DTYPES", {torch.float32: 1})  # float32 read as bfloat16
    with pytest.raises(ArithmeticError, match="some captions: RMS error"):
        attention.main(["--rounds", "2", "--dtypes", "float32"])


def test_environment_names_no_person_and_no_place():
    facts = environment.environment()
    assert set(facts) == set(environment.ENVIRONMENT)
    assert not any("/" in str(value) for value in facts.values())
    assert harness.reason(OSError("cannot open /home/me/x.so: no\nmore")) == "OSError: cannot open <path>: no"
    assert environment.clock(torch.device("cpu")).keys() <= {"mhz", "governor", "load"}
    assert environment.available_bytes(torch.device("cpu")) > 0


def test_an_image_is_the_same_in_every_batch():
    one, many = (workload.inputs(TINY, batch, workload.Captions(8, 24))["image"] for batch in (1, 5))
    assert torch.equal(one[0], many[0]) and not torch.equal(many[0], many[1])


def test_exact_answers_are_of_rounded_weights():
    weights = workload.random_weights(TINY)
    data = workload.inputs(TINY, 2, workload.Captions(8, 24))
    found = workload.exact("image", weights, data["image"], torch.bfloat16)
    by_hand = reference.encode_image(workload.rounded(weights, torch.bfloat16), data["image"].bfloat16())
    assert torch.equal(found, by_hand) and not torch.equal(found, reference.encode_image(weights, data["image"]))
    texts = workload.exact("text", weights, data["text"], torch.float32)
    images = workload.exact("image", weights, data["image"], torch.float32)
    logits = workload.exact_logits(images, texts, weights["logit_scale"])
    torch.testing.assert_close(logits, reference.forward(weights, data["image"], data["text"])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_is_computed_once_for_all_its_groups(dtype, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    captions, name = workload.Captions(8, 24), str(dtype).removeprefix("torch.")
    towers = ("image", "text", "both")
    groups = [plan.Group("tiny", name, tower, batch, "8-24") for tower in towers for batch in (1, 5, 12)]
    # of another dtype, and one that would not fit into memory
    others = [groups[0]._replace(dtype="float16"), groups[0]._replace(batch=10**9)]
    # of the last batch not every sample: 2 at the least
    found = Exact(plan.Costs({"float32": 1e8, name: 1e8}, {"tiny": TINY}), others + groups, captions)
    exact, calls = workload.exact, []
    monkeypatch.setattr(workload, "exact", lambda tower, *rest: calls.append(tower) or exact(tower, *rest))
    weights = workload.random_weights(TINY)
    spec = peers.Spec(weights, TINY, dtype)
    assert found.seconds(groups) > 0
    for group in groups:
        data = workload.inputs(TINY, group.batch, captions)
        truth = found.truth(group, spec)
        assert truth.chosen[0] == 0 and truth.chosen[-1] == group.batch - 1
        answers = [exact(tower, weights, data[tower][truth.chosen], dtype) for tower in workload.TOWERS]
        logits = workload.exact_logits(*answers, weights["logit_scale"])
        expected = dict(zip(towers, (*answers, logits), strict=True))[group.tower]
        torch.testing.assert_close(truth.exact, expected, rtol=1e-9, atol=1e-9)
        assert truth.exact.dtype == torch.float64
    assert calls == ["image", "text"]
    assert found.seconds(groups) == 0 and found.seconds(others) > 0


def test_captions_of_a_file_are_tokenised_and_spread(tmp_path):
    path = tmp_path / "captions.txt"
    lines = [f"a photo of {i} cats" for i in range(6)]
    path.write_text("\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n")
    captions = workload.CaptionFile(path)
    assert str(captions) == "file captions.txt"
    expected = tokenize(lines).long()
    assert torch.equal(captions.ids(WORDS, 3, 0), expected[[0, 2, 4]])
    assert torch.equal(captions.ids(WORDS, 8, 0), expected[[0, 1, 2, 3, 4, 5, 0, 1]])
    with pytest.raises(ValueError, match="49408 ids"):
        captions.ids(TINY, 3, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"\n \n", "no line of text"),
        (b"ok\n" + b"word " * 90, "line 2"),
    ],
    ids=["missing", "bytes", "empty", "long"],
)
def test_a_bad_file_of_captions_is_named(content, message, tmp_path):
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        workload.CaptionFile(path)
    assert "captions.txt" in str(caught.value)


def test_a_percentile_needs_enough_calls():
    assert set(harness.times([1.0] * 19)) == {*harness.TIMES, "seconds"}
    assert "p95_s" in harness.times([1.0] * 20) and "p99_s" not in harness.times([1.0] * 99)
    found = harness.times([float(i) for i in range(101)])
    assert (found["median_s"], found["p20_s"], found["p95_s"], found["p99_s"]) == (50, 20, 95, 99)
