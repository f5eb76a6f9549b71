"""`clipfast profile`: every operator is found with its least work, shares add up, and nothing stays wrapped."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
import torch

from clipfast import dispatch, ops, roofline
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import ceilings, workload
from clipfast.bench.peers import Spec, ours
from clipfast.cli import main
from clipfast.profiling import marks, measure, steps
from clipfast.roofline import Work

from .bench_models import TINY, TINY_RESNET, WORDS

RATES = {"float32": 1e11, "bfloat16": 2e11}
CEILINGS = ceilings.Ceilings({ceilings.COPY: 1e10, **RATES}, dict.fromkeys(RATES, ceilings.PEAK), RATES)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", WORDS)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes, quick: CEILINGS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return ours.model(Spec(workload.random_weights(TINY), TINY, torch.float32))


@pytest.fixture(scope="module")
def data():
    return workload.inputs(TINY, 3, workload.Captions(8, 24))


@pytest.mark.parametrize("tower", workload.TOWERS)
def test_marks_see_every_operator(model, data, tower):
    step = steps.tower(model, tower, data[tower])
    plain = step()
    pooled = ops.pooled_block_by_operators
    with marks.marked(model) as seen:
        assert ops.run is not dispatch.run
        # one by one they round a LayerNorm's rows before the product, in one call not
        torch.testing.assert_close(step(), plain, rtol=1e-4, atol=1e-5)
    assert ops.run is dispatch.run and ops.pooled_block_by_operators is pooled
    blocks = [call.layer for call in seen.calls if call.layer != marks.OUTSIDE]
    assert list(dict.fromkeys(blocks)) == [f"{tower} block  0", f"{tower} block  1"]
    # one less in the last block
    operators = [call.operator for call in seen.calls if call.layer == f"{tower} block  0"]
    assert operators == ["layer_norm", "linear", "attention", "linear", "mlp"]
    assert [call.operator for call in seen.calls][-1] == "project"


@pytest.mark.parametrize("tower", workload.TOWERS)
def test_the_work_of_the_calls_is_the_work_of_the_tower(model, data, tower):
    step = steps.tower(model, tower, data[tower])
    with marks.marked(model) as seen:
        step()
    lengths = sorted((data["text"].argmax(dim=-1) + 1).tolist())
    whole = roofline.total(roofline.works_of(TINY, tower, lengths, 4))
    calls = roofline.total(work for call in seen.calls for work in call.works)
    assert calls.flops == whole.flops


def test_marks_are_taken_away_after_an_error(model):
    with pytest.raises(RuntimeError, match="no"), marks.marked(model):
        raise RuntimeError("no")
    assert ops.run is dispatch.run


@pytest.mark.parametrize("tower", workload.TOWERS)
def test_parts_add_up_to_the_pass(model, data, tower):
    found = measure.passes(steps.tower(model, tower, data[tower]), model, CPU, 3)
    by_name = {part.name: part for part in found.operators}
    rest, *timed = reversed(found.operators)
    assert rest.name == measure.REST
    expected = {"layer_norm", "linear", "attention", "mlp", "attention_pool", "project"}
    assert set(by_name) - {measure.REST} == expected | ({"patch_embed"} if tower == "image" else set())
    assert (by_name["mlp"].calls, by_name["linear"].calls, by_name["attention"].calls) == (2, 3, 1)
    sums = [sum(part.seconds[number] for part in found.operators) for number in range(3)]
    assert statistics.median(sums) == pytest.approx(found.profiled, rel=1e-3)
    assert all(0 <= some < whole for some, whole in zip(rest.seconds, sums, strict=True))
    # each call counts once by operator and once by layer: pass by pass, since medians of parts do not add up
    by_operator = [sum(part.seconds[number] for part in timed) for number in range(3)]
    by_layer = [sum(part.seconds[number] for part in found.layers) for number in range(3)]
    assert by_layer == pytest.approx(by_operator)
    inside = sum(seconds for layer in found.by_layer.values() for seconds in layer.values())
    assert inside == pytest.approx(statistics.mean(by_layer))
    assert set(found.by_layer) == {part.name for part in found.layers}
    assert found.plain > 0 and found.profiled > 0 and found.overhead == found.profiled / found.plain - 1


def test_a_resnet_is_profiled_too():
    model = ours.model(Spec(workload.random_weights(TINY_RESNET), TINY_RESNET, torch.bfloat16))
    images = workload.inputs(TINY_RESNET, 2, workload.Captions(8, 24))["image"].bfloat16()
    found = measure.passes(steps.tower(model, "image", images), model, CPU, 2)
    assert {"attention_pool", "linear", measure.REST} <= {part.name for part in found.operators}


def test_a_train_step_has_its_backward(model, data):
    trained = ours.model(Spec(workload.random_weights(TINY), TINY, torch.float32))
    step, loss = steps.train(trained, data["image"], data["text"], torch.float32)
    assert loss
    before = trained.text_projection.detach().clone()
    found = {part.name: part for part in measure.passes(step, trained, CPU, 2).operators}
    assert not torch.equal(before, trained.text_projection)
    for name in ("mlp", "linear", "attention"):
        gradients = found[measure.BACKWARD + name]
        assert gradients.median > 0
        assert roofline.total(gradients.works).flops == 2 * roofline.total(found[name].works).flops
    assert {"loss", "optimiser"} <= set(found)


def test_rows_say_how_far_the_floor_is():
    part = measure.Part("mlp", [0.4, 0.5, 0.6], 2, [Work(2 * 10**10, 10**9, 0)])
    row = part.row(1.0, CEILINGS.rates, "float32")
    assert (row["seconds"], row["share"], row["floor_s"], row["of_floor"]) == (0.5, 0.5, 0.2, 0.4)
    assert (row["tflops"], row["gb_per_s"], row["bound"]) == (0.04, 2, "compute")
    text = measure.bottleneck([row, {"part": "rest", "seconds": 0.1, "share": 0.1}], "encode_image")
    assert text == (
        "mlp takes 50% of encode_image, at 40 GFLOP/s: 40% of what this machine's arithmetic allows, "
        "so that up to 300 ms a pass (30%) could be gained."
    )
    slow = measure.Part("decode", [2.0]).row(4.0, CEILINGS.rates, "float32")
    assert measure.bottleneck([row, slow], "files to embeddings") == "decode takes 50% of files to embeddings."


def profile(folder, *more):
    fixed = ["--model", "tiny", "--batch", "2", "--passes", "2", "--threads", "1", "--out", str(folder)]
    return main(["profile", *fixed, *more])


@pytest.mark.parametrize("what", ["image", "text", "train"])
def test_the_command_prints_and_writes(what, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert profile(tmp_path, "--what", what, "--trace", str(trace)) == 0
    text = capsys.readouterr().out
    assert "overhead" in text and " takes " in text and "mlp" in text
    with (tmp_path / f"tiny-{what}-float32-b2.csv").open() as file:
        rows = list(csv.DictReader(file))
    operators = {row["part"]: row for row in rows if row["kind"] == "operator"}
    assert float(operators["mlp"]["tflops"]) > 0 and float(operators["mlp"]["of_floor"]) > 0
    assert {row["kind"] for row in rows} == {"operator", "layer"}
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any(name.startswith("clipfast::mlp") for name in names)
    assert any(name.startswith("clipfast::layer ") for name in names)
    whole = json.loads((tmp_path / f"tiny-{what}-float32-b2.json").read_text())
    assert whole["bottleneck"] and whole["pass_s"] > 0


def test_the_way_from_files_is_split_into_stages(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((90, 70 + i), 50).convert("RGB").save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    assert profile(tmp_path, "--what", "files", "--images", str(folder)) == 0
    text = capsys.readouterr().out
    with (tmp_path / "tiny-files-float32-b2.csv").open() as file:
        parts = {row["part"]: float(row["seconds"]) for row in csv.DictReader(file)}
    for stage in ("read", "decode", "resize", "tokenise", "copy", "mlp"):
        assert parts[stage] > 0, stage
    assert "2 different files" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B/99"], "ViT-B/99"),
        (["--what", "audio"], "audio"),
        (["--batch", "0"], "at least 1"),
        (["--what", "files", "--images", "no-such-folder"], "no-such-folder"),
        (["--captions", "no-such-file"], "no-such-file"),
        (["--trace", "no-such-folder/trace.json"], "no-such-folder"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys, tmp_path):
    assert profile(tmp_path, *arguments) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_folder_without_images_is_named(tmp_path, capsys):
    assert profile(tmp_path, "--what", "files", "--images", str(tmp_path)) == 1
    assert "has no image" in capsys.readouterr().err
