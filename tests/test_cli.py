"""The command line, run in this process: the demo from end to end, and each command with good and bad files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipfast
from clipfast import cli, commands, demo, doctor, reference, timing

skimage = pytest.importorskip("skimage")
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A ViT of two small blocks with the real vocabulary, saved."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    clipfast.save(clipfast.CLIP(32, 32, 2, 64, 16, 77, 49408, 64, 1, 2), path)
    return path


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with four photographs, an empty file, a truncated one and one that is no image; the current one."""
    for name in NAMES:
        shutil.copy(PHOTOGRAPHS / name, tmp_path / name)
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.jpg").write_bytes((PHOTOGRAPHS / "rocket.jpg").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    return tmp_path


def expected(model: Path, names, texts):
    """Embeddings by the float64 reference."""
    weights = clipfast.load(model, "cpu")[0].state_dict()
    pixels = clipfast.Preprocess(32)([PHOTOGRAPHS / name for name in names])
    return reference.encode_image(weights, pixels), reference.encode_text(weights, clipfast.tokenize(texts))


# ---- demo ----


def test_demo_trains_reads_checks_and_draws(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    status = cli.main(["demo", "--quick", "--out", str(out), "--device", "cpu"])
    told = capsys.readouterr()
    assert status == 0, told
    figures = json.loads((out / "results.json").read_text())
    test = figures["test"]
    assert test["images"] == 360 == sum(map(sum, test["confusion"]))
    assert test["accuracy"] == sum(test["confusion"][i][i] for i in range(10)) / 360 >= demo.QUICK_ACCURACY
    assert f"{test['right']} of 360 right" in told.out
    assert figures["training"]["loss"][-1] < figures["training"]["loss"][0] / 2
    assert figures["float64"]["same"] + figures["float64"]["ties"] == 360
    assert max(figures["float64"]["image_gap"], figures["float64"]["text_gap"]) < 1e-9
    assert figures["throughput"] is None
    with Image.open(out / "demo.png") as picture:
        assert min(picture.size) > 800
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 200
    assert str(out / "demo.png") in told.out

    # the saved model is an ordinary checkpoint, and gives the accuracy that was told
    model, preprocess = clipfast.load(out / "digits.pt", "cpu")
    digits = demo.d.load_digits()
    with torch.no_grad():
        images = F.normalize(model.encode_image(preprocess(digits.test)), dim=-1)
        texts = F.normalize(model.encode_text(clipfast.tokenize([f"a handwritten {n}" for n in range(10)])), dim=-1)
    right = ((images @ texts.T).argmax(1) == digits.test_classes).double().mean().item()
    assert abs(right - test["accuracy"]) < 0.1


def test_demo_fails_when_accuracy_is_low(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert re.search(r"demo failed: [\d.]+ % of the test digits are right, below 75 %", capsys.readouterr().err)
    assert json.loads((tmp_path / "results.json").read_text())["test"]["accuracy"] < demo.QUICK_ACCURACY


def test_demo_fails_when_a_result_strays_from_float64():
    digits = demo.d.load_digits()
    rows = F.normalize(torch.randn(10, 8), dim=-1)
    confusion = torch.eye(10, dtype=torch.int64) * 36
    reading = demo.d.Reading(rows, rows, torch.arange(10), confusion, 1.0, {}, {})
    assert len(digits.test) == 360
    good = demo.d.Check(same=359, ties=1, different=0, image_gap=1e-13, text_gap=1e-13)
    assert demo._failures(reading, good, 150, 0.75, True) == []
    for change in ({"different": 1}, {"image_gap": 1e-5}, {"text_gap": float("nan")}):
        assert len(demo._failures(reading, demo.d.Check(**{**vars(good), **change}), 150, 0.75, True)) == 1


def test_demo_check_tells_ties_from_differences():
    torch.manual_seed(0)
    model = clipfast.CLIP(**demo.d.MODEL).eval()
    digits = demo.d.load_digits()
    pixels = clipfast.Preprocess(32)(digits.test[:20])
    digits = demo.d.Digits(digits.train, digits.train_classes, digits.test[:20], digits.test_classes[:20])
    reading = demo.d.read(digits, model.encode_image, model.encode_text, pixels)
    result = demo.d.check(reading, model.state_dict(), pixels)
    assert (result.same, result.ties, result.different) == (20, 0, 0)
    reading.predictions[3] = (reading.predictions[3] + 1) % 10
    result = demo.d.check(reading, model.state_dict(), pixels)
    assert (result.same, result.ties, result.different) == (19, 0, 1)
    reading.images[0] += 0.01
    assert demo.d.check(reading, model.state_dict(), pixels).image_gap > 1e-6


def test_demo_classifies_with_sentences_it_was_not_trained_on():
    sentences = {text for digit in range(10) for text in demo.d.captions(demo.d.TRAINED, digit)}
    unseen = [text for digit in range(10) for text in demo.d.captions(demo.d.PROMPTS, digit)] + list(demo.d.QUERIES)
    trained = {tuple(row) for row in clipfast.tokenize(sorted(sentences)).tolist()}
    assert not trained & {tuple(row) for row in clipfast.tokenize(unseen).tolist()}


def test_demo_splits_digits_by_class_without_overlap():
    digits = demo.d.load_digits()
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert torch.bincount(digits.test_classes).min() >= 34
    assert torch.equal(digits.test_classes, demo.d.load_digits().test_classes)
    assert np.asarray(digits.train[0]).max() > 200


def test_demo_without_its_libraries_names_the_extra(tmp_path, monkeypatch, capsys):
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert cli.main(["demo", "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err == "clipfast: the demo needs scikit-learn: pip install 'clipfast[demo]'\n"
    assert not (tmp_path / "x").exists()


def test_demo_interrupted_says_what_is_there(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_read", interrupt)
    arguments = ["demo", "--quick", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(arguments) == 130
    assert f"interrupted; written: {tmp_path / 'digits.pt'}\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["digits.pt"]
    monkeypatch.setattr(demo, "_train", interrupt)
    assert cli.main(arguments) == 130
    assert "interrupted; written: nothing\n" in capsys.readouterr().err


def test_demo_compares_contestants_with_float64(monkeypatch, capsys):
    """The comparison itself, on towers small enough for a test."""
    from clipfast.demo import photographs

    small = {"image_resolution": 64, "vision_layers": 2, "transformer_layers": 2, "embed_dim": 64}
    sizes = {"vision_width": 128, "transformer_width": 128, "transformer_heads": 2}
    monkeypatch.setattr(photographs, "VIT_B_32", {**photographs.VIT_B_32, **small, **sizes})
    assert len(photographs.photographs()) >= 15
    seen = []
    result = photographs.compare(torch.device("cpu"), lambda so_far, name: seen.append(name), seconds=0)
    assert seen[0] == "float32" and set(seen) == set(result.rounds)
    names = [row.name for row in result.rows if row.dtype == "float32"]
    assert names[:2] == ["clipfast", "plain PyTorch"]
    for row in result.rows:
        bound = 1e-9 if row.dtype == "float32" else 5e-3
        assert 0 < row.image_gap < bound and 0 < row.text_gap < bound, row
        assert row.images_per_second > 0 and row.texts_per_second > 0
    # transformers cannot be told these sizes, openai-clip can
    assert "transformers" in result.missing
    table = demo._table(result, "float32")
    assert len(table.splitlines()) == 1 + len(names)


def test_demo_plain_contestant_calls_every_module(monkeypatch):
    from clipfast.demo import photographs

    sizes = {"image_resolution": 64, "vision_layers": 2, "transformer_layers": 3, "embed_dim": 64}
    monkeypatch.setattr(photographs, "VIT_B_32", {**photographs.VIT_B_32, **sizes})
    images, text = torch.randn(2, 3, 64, 64), clipfast.tokenize(["a", "a longer text"])
    _, (ours, plain, *_), _ = photographs.contestants(torch.device("cpu"), images, text)
    lengths: list[int] = []
    attend = F.multi_head_attention_forward.__code__

    def profile(frame, event, _):
        if event == "call" and frame.f_code is attend:
            lengths.append(len(frame.f_locals["query"]))

    # watched from outside: a function put in its place would be noticed, and send ours the long way too
    for one, expected_lengths in ((ours, []), (plain, [5, 5, 77, 77, 77])):
        lengths.clear()
        sys.setprofile(profile)
        try:
            with torch.no_grad():
                one.encode_image(images), one.encode_text(text)
        finally:
            sys.setprofile(None)
        assert lengths == expected_lengths, one.name


# ---- classify ----


def test_classify_gives_the_probabilities_of_float64(model, files, capsys):
    labels = ["cat", "rocket", "cup of coffee"]
    arguments = ["classify", *NAMES, "--labels", "cat, rocket,cup of coffee", "--model", str(model), "--json"]
    assert cli.main([*arguments, "--batch", "3"]) == 0
    records = json.loads(capsys.readouterr().out)
    images, texts = expected(model, NAMES, [f"a photo of a {label}." for label in labels])
    scale = clipfast.load(model, "cpu")[0].logit_scale.double()
    exact = reference.logits(images, texts, scale)[0].softmax(-1)
    assert [record["image"] for record in records] == list(NAMES)
    for record, row in zip(records, exact, strict=True):
        found = {entry["label"]: entry["probability"] for entry in record["labels"]}
        torch.testing.assert_close(torch.tensor([found[label] for label in labels]).double(), row, atol=1e-5, rtol=0)
        values = [entry["probability"] for entry in record["labels"]]
        assert values == sorted(values, reverse=True)


def test_classify_prints_the_best_labels(model, files, capsys):
    (files / "labels.txt").write_text("cat\n\n  rocket \nchelsea, the cat\n", "utf-8")
    arguments = ["classify", "chelsea.png", "--labels-file", "labels.txt", "--model", str(model), "--top", "2"]
    assert cli.main([*arguments, "--template", "{}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chelsea.png" and len(lines) == 3
    assert all(re.fullmatch(r" +\d+\.\d\d %  (cat|rocket|chelsea, the cat)", line) for line in lines[1:])


def test_classify_does_the_good_images_and_names_the_bad(model, files, capsys):
    given = ["empty.png", "chelsea.png", "missing.png", "cut.jpg", "text.png", "rocket.jpg"]
    arguments = ["classify", *given, "--labels", "cat,dog", "--model", str(model)]
    assert cli.main(arguments) == 1
    told = capsys.readouterr()
    assert [line for line in told.out.splitlines() if not line.startswith(" ")] == ["chelsea.png", "rocket.jpg"]
    complaints = told.err.splitlines()
    for name, line in zip(("empty.png", "missing.png", "cut.jpg", "text.png"), complaints, strict=True):
        assert line.startswith(f"clipfast: {name}")
    assert cli.main([*arguments, "--json"]) == 1
    records = json.loads(capsys.readouterr().out)
    assert ["error" in record for record in records] == [True, False, True, True, True, False]


def test_classify_names_a_label_that_is_too_long(model, files, capsys):
    assert cli.main(["classify", "chelsea.png", "--labels", f"cat,{'dog ' * 90}", "--model", str(model)]) == 1
    assert "the caption of 'dog dog" in capsys.readouterr().err


# ---- encode ----


def test_encode_writes_aligned_embeddings(model, files, capsys):
    texts = ["a photo of a cat", "ein Foto einer Katze, schön", "x"]
    (files / "captions.txt").write_text("\n".join(texts) + "\n", "utf-8")
    arguments = ["encode", *NAMES, "--text", "captions.txt", "--out", "out.npz", "--model", str(model)]
    assert cli.main([*arguments, "--batch", "2"]) == 0
    assert "4 images and 3 texts, 32 numbers each" in capsys.readouterr().out
    images, rows = expected(model, NAMES, texts)
    with np.load("out.npz") as found:
        assert sorted(found) == ["image_embeddings", "image_paths", "text_embeddings", "texts"]
        assert found["image_paths"].tolist() == list(NAMES) and found["texts"].tolist() == texts
        assert found["image_embeddings"].dtype == found["text_embeddings"].dtype == np.float32
        np.testing.assert_allclose(found["image_embeddings"], images, atol=1e-5)
        np.testing.assert_allclose(found["text_embeddings"], rows, atol=1e-5)
        assert abs(np.linalg.norm(found["image_embeddings"], axis=1) - 1).min() > 1e-3
    assert cli.main([*arguments, "--normalize"]) == 0
    with np.load("out.npz") as found:
        np.testing.assert_allclose(found["image_embeddings"], F.normalize(images, dim=-1), atol=1e-6)
        np.testing.assert_allclose(found["text_embeddings"], F.normalize(rows, dim=-1), atol=1e-6)


def test_encode_leaves_out_what_it_cannot_use(model, files, capsys):
    (files / "captions.txt").write_text(f"a cat\n{'dog ' * 90}\na rocket\n", "utf-8")
    given = ["empty.png", "rocket.jpg", "missing.png", "cut.jpg", "chelsea.png"]
    arguments = ["encode", *given, "--text", "captions.txt", "--out", "out.npz", "--model", str(model)]
    assert cli.main(arguments) == 1
    told = capsys.readouterr()
    assert "4 left out" in told.out
    for name in ("captions.txt", "empty.png", "missing.png", "cut.jpg"):
        assert any(line.startswith(f"clipfast: {name}") for line in told.err.splitlines()), told.err
    with np.load("out.npz") as found:
        assert found["image_paths"].tolist() == ["rocket.jpg", "chelsea.png"]
        assert found["texts"].tolist() == ["a cat", "a rocket"]
        images, _ = expected(model, ["rocket.jpg", "chelsea.png"], ["x"])
        np.testing.assert_allclose(found["image_embeddings"], images, atol=1e-5)
    assert cli.main(["encode", "--text", "captions.txt", "--truncate", "--out", "t.npz", "--model", str(model)]) == 0
    with np.load("t.npz") as found:
        assert found["text_embeddings"].shape == (3, 32) and found["image_embeddings"].shape == (0, 32)


def test_encode_writes_whole_or_not_at_all(model, files, monkeypatch, capsys):
    (files / "out.npz").write_text("the old one")
    before = sorted(files.iterdir())

    def fail(*args, **kwargs):
        args[0].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commands.np, "savez", fail)
    assert cli.main(["encode", "chelsea.png", "--out", "out.npz", "--model", str(model)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert (files / "out.npz").read_text() == "the old one" and sorted(files.iterdir()) == before
    monkeypatch.undo()
    # a reader that has the old file open keeps it whole: the new one takes its name, not its place on the disk
    os.link(files / "out.npz", files / "reader")
    arguments = ["encode", str(files / "chelsea.png"), "--out", str(files / "out.npz"), "--model", str(model)]
    assert cli.main(arguments) == 0
    assert (files / "reader").read_text() == "the old one"


def test_encode_writes_nothing_when_nothing_is_left(model, files, capsys):
    assert cli.main(["encode", "empty.png", "--out", "out.npz", "--model", str(model)]) == 1
    assert "out.npz was not written" in capsys.readouterr().err
    assert not (files / "out.npz").exists()


def test_encode_takes_names_that_are_not_utf8(model, files, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(files / "chelsea.png", files / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has UTF-8 names only")
    assert cli.main(["encode", name, "--out", "out.npz", "--model", str(model)]) == 0
    with np.load("out.npz") as found:
        assert found["image_paths"].tolist() == [name]
    assert cli.main(["classify", name, "--labels", "a", "--model", str(model)]) == 0
    assert "caf" in capsys.readouterr().out


# ---- doctor, models, errors ----


def test_doctor_reports_versions_and_every_operator(capsys):
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert (
        f"torch           {torch.__version__}" in told or "torch           " + torch.__version__.split("+")[0] in told
    )
    for operator, _, _, decision in clipfast.explain("cpu", torch.float32):
        assert re.search(rf"^  {operator} +{decision.backend} ", told, re.MULTILINE), operator
    for _, _, _, decision in clipfast.explain("cpu", torch.float32, grad=True):
        for name, why in decision.others:
            if name in ("cuda", "triton") and not torch.cuda.is_available():
                name, why = "cuda, triton", "run on a GPU ["
            assert f"{name}: {why}" in " ".join(told.split()), why
    assert str(Path.home()) not in told and sys.prefix not in told


def test_doctor_says_what_a_missing_library_is_for(monkeypatch):
    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    told = doctor.report()
    assert "NOT INSTALLED: clipfast needs it" in told
    assert "not installed, and needed for .safetensors checkpoints only: pip install safetensors" in told
    assert re.search(r"^  flash-attn +not installed", told, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_doctor_does_not_send_a_cpu_for_what_a_gpu_uses(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda names: None)
    told = doctor.report()
    for name, purpose in (("triton", "clipfast's kernels"), ("flash-attn", "Hugging Face's attention")):
        assert f"  {name:<16}not installed, and of no use here: it is for {purpose} on a GPU\n" in told
        assert f"pip install {name}" not in told
    monkeypatch.setattr(doctor, "nvidia_smi", lambda query: {"name": "NVIDIA H100"})
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "NVIDIA H100, not used: this PyTorch is built without CUDA" in doctor.report()


def test_doctor_says_what_the_cpu_library_does_or_why_there_is_none(monkeypatch):
    monkeypatch.delenv(doctor.cpu_library.SWITCH, raising=False)
    monkeypatch.setattr(doctor.cpu_library, "missing", lambda: None)
    monkeypatch.setattr(doctor.cpu_library, "best", lambda: "avx2")
    assert "  libclipfast_cpu clipfast's own operators run with avx2\n" in doctor.report()
    monkeypatch.setattr(
        doctor.cpu_library, "missing", lambda: "the CPU library is not built (g++ was not found); do so"
    )
    assert "  libclipfast_cpu the CPU library is not built (g++ was not found); do so\n" in doctor.report()


@pytest.mark.parametrize(
    ("version", "notes"),
    [("2.6.0", 1), ("2.7.1+cu128", 1), ("2.8.0", 0), ("2.13.0+cpu", 0), ("3.2.0", 1), ("3.3.1", 1), ("3.4.0", 0)],
)
def test_doctor_says_what_an_older_version_gets(version, notes, monkeypatch):
    package = "torch" if version.startswith("2.") else "triton"
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version if name == package else real(name))
    line = next(line for line in doctor.report().splitlines() if line.split()[:1] == [package])
    assert version in line and line.count("before") == notes


def test_models_and_version(capsys):
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out.split() == clipfast.available_models()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"clipfast {clipfast.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["classify", "a.png"], "--labels"),
        (["classify", "a.png", "--labels", "a,,b"], "separated by commas"),
        (["classify", "a.png", "--labels", "a", "--template", "a photo"], "{} once"),
        (["classify", "a.png", "--labels", "a", "--top", "0"], "at least 1"),
        (["encode", "--out", "x.npz"], "images, --text, or both"),
        (["encode", "a.png"], "--out"),
        (["encode", "a.png", "--out", "x.npz", "--batch", "-3"], "at least 1"),
        (["demo", "--steps", "many"], "at least 1"),
    ],
)
def test_wrong_usage_is_status_2(arguments, text, capsys):
    assert cli.main(arguments) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["classify", "chelsea.png", "--labels", "a", "--model", "ViT-Z/1"], "Model ViT-Z/1 not found"),
        (["classify", "chelsea.png", "--labels", "a", "--model", "text.png"], "text.png is not a checkpoint"),
        (["classify", "chelsea.png", "--labels", "a", "--device", "toaster"], "unknown device 'toaster'"),
        (["classify", "chelsea.png", "--labels", "a", "--device", "cuda:99"], "device 'cuda:99' is not here"),
        (["classify", "chelsea.png", "--labels-file", "none.txt"], "none.txt: No such file"),
        (["classify", "chelsea.png", "--labels-file", "rocket.jpg"], "rocket.jpg is not UTF-8 text"),
        (["classify", "chelsea.png", "--labels-file", "empty.png"], "empty.png has no line of text"),
        (["encode", "chelsea.png", "--out", "none/x.npz"], "there is no folder none"),
        (["encode", "chelsea.png", "--out", "."], ".: cannot be written: it is a folder"),
        (["demo", "--out", "text.png"], "text.png: is a file, and a folder is wanted"),
    ],
)
def test_a_failure_is_one_line_and_status_1(arguments, text, files, capsys):
    assert cli.main(arguments) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("clipfast: ") and told.err.count("\n") == 1
    assert text in told.err


def test_debug_shows_the_traceback(files, monkeypatch):
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(RuntimeError, match="Model nothing not found"):
        cli.main(["classify", "chelsea.png", "--labels", "a", "--model", "nothing"])


def test_python_m_runs_it_and_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        f"'{sys.executable}' -m clipfast models | head -c 1", shell=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "R" and "Traceback" not in done.stderr


# ---- timing ----


def test_interleaved_rotates_and_counts():
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.interleaved(functions, rounds=4, warmup=2)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 6 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds[2:]} == {"a", "b", "c"}


def test_interleaved_measures_each_function(monkeypatch):
    clock = [0.0]

    def takes(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = timing.interleaved({"short": takes(0.25), "long": takes(4.0)}, rounds=3)
    assert found == {"short": [0.25] * 3, "long": [4.0] * 3}
    assert timing.medians({"short": [1.0, 9.0, 2.0], "long": [4.0]}) == {"short": 2.0, "long": 4.0}


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"rounds": 1, "warmup": -1}])
def test_interleaved_refuses_no_rounds(wrong):
    with pytest.raises(ValueError, match="rounds must be"):
        timing.interleaved({}, **wrong)
