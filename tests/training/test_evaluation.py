"""Accuracy and recall beside an oracle that holds every similarity and sorts."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clipfast
from clipfast import cli, reference
from clipfast.commands import CommandError
from clipfast.training import evaluation
from clipfast.training.evaluation import Evaluator, class_names, hit_rates, retrieval, zero_shot
from clipfast.training.samples import DataSource, find_samples

from .pairs import COLOURS, caption_of, make_image, make_model, write_classes, write_folder

TEMPLATES = ("a {}.", "a painting of a {}", "{}")


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = make_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def exact_rows(model, images, texts):
    """Directions by the float64 reference."""
    pixels = clipfast.Preprocess(32)(images)
    weights = model.state_dict()
    tokens = clipfast.tokenize(texts, 16, truncate=True)
    rows = reference.encode_image(weights, pixels), reference.encode_text(weights, tokens)
    return [F.normalize(part, dim=-1) for part in rows]


def oracle(similarity, own, k):
    """Share of rows with one of their own columns among the first k, sorted one row at a time."""
    hits = [any(own[row][column] for column in np.argsort(-similarity[row])[:k]) for row in range(len(similarity))]
    return np.mean(hits)


@pytest.fixture
def captioned(tmp_path):
    """A table in which image i has 1 + i % 3 captions, not in a row, and one image that is not there."""
    rows = [(f"{i}.png", f"{caption_of(i)} again {turn}") for turn in range(3) for i in range(13) if turn <= i % 3]
    for i in range(13):
        make_image(i).save(tmp_path / f"{i}.png")
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows[:8], ("gone.png", "x"), ("0.png", " "), *rows[8:]])
    return tmp_path / "pairs.csv", rows


def test_retrieval_is_the_oracles(model, captioned, monkeypatch):
    table, rows = captioned
    # several chunks
    monkeypatch.setattr(evaluation, "CELLS", 40)
    evaluator = Evaluator(model, batch=5)
    found = retrieval(evaluator, find_samples(DataSource([str(table)])))
    images, texts = exact_rows(model, [make_image(i) for i in range(13)], [text for _, text in rows])
    similarity = (images @ texts.T).numpy()
    own = np.array([[name == f"{i}.png" for name, _ in rows] for i in range(13)])
    assert (found["images"], found["captions"]) == (13, len(rows))
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(oracle(similarity, own, k))
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(oracle(similarity.T, own.T, k))
    assert 0 < found["text_to_image_recall@5"] < 1
    reasons = [sample.reason for sample in evaluator.bad]
    assert len(reasons) == 2 and "empty caption" in reasons[0] and "gone.png: No such file" in reasons[1]


def test_zero_shot_is_the_oracles(model, tmp_path):
    samples = find_samples(DataSource([str(write_classes(tmp_path, 12))]))
    (tmp_path / "dark_red" / "broken.png").write_text("x")
    samples = find_samples(DataSource([str(tmp_path)]))
    evaluator = Evaluator(model, batch=5, workers=2)
    found = zero_shot(evaluator, samples, TEMPLATES)
    names = ["dark blue", "dark green", "dark red"]
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    images, texts = exact_rows(model, [make_image(i) for i in range(12)], prompts)
    means = F.normalize(texts.unflatten(0, (3, 3)).mean(1), dim=-1)
    truth = [names.index(f"dark {list(COLOURS)[i % 3]}") for i in range(12)]
    right = ((images @ means.T).argmax(1).numpy() == truth).mean()
    assert found == {"zero_shot_top1": pytest.approx(right), "zero_shot_top5": 1.0, "images": 12, "classes": 3}
    assert [sample.name for sample in evaluator.bad] == [str(tmp_path / "dark_red" / "broken.png")]


def test_templates_are_averaged(tmp_path):
    """The image is between the two prompts of its class, and nearer to the other class's than to either."""
    samples = find_samples(DataSource([str(write_classes(tmp_path, 2))]))
    rows = {"a dark green": (1, 0), "no dark green": (0, 1), "a dark red": (0.8, 0.6), "no dark red": (0.8, -0.6)}

    class Between:
        bad = ()

        def texts(self, prompts):
            return torch.tensor([rows[prompt] for prompt in prompts])

        def images(self, samples, numbers):
            return F.normalize(torch.ones(1, 2), dim=-1), numbers[:1]

    found = zero_shot(Between(), samples, ("a {}", "no {}"))
    assert samples.classes == ["dark green", "dark red"]
    assert found["zero_shot_top1"] == 1


def test_ties_count_as_chance():
    same = torch.ones(6, 4) / 2
    numbers = torch.arange(6)
    assert hit_rates(same, same, numbers, numbers) == pytest.approx({1: 1 / 6, 5: 5 / 6, 10: 1.0})
    # one foreign key above, one level with the own one
    keys = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0], [0.6, -0.8]])
    query = torch.tensor([[1.0, 0.0]])
    groups = torch.tensor([7, 3, 7, 9])
    assert hit_rates(query, keys, torch.tensor([3]), groups, (2, 3, 4)) == pytest.approx({2: 0, 3: 0.5, 4: 1})
    # the best of the own keys counts
    assert hit_rates(query, keys, torch.tensor([7]), groups, (1,)) == {1: 1.0}


def test_equal_captions_and_equal_images_are_ties(model, tmp_path, monkeypatch):
    """Whatever batch and tile they fall into: the last ones here are alone in theirs."""
    captions = ["dark red", "dark blue", "dark red", "dark red", "Dark  red"]
    for i in range(5):
        make_image(i % 3 // 2).save(tmp_path / f"{i}.png")
    table = tmp_path / "pairs.csv"
    table.write_text("path,caption\n" + "".join(f"{i}.png,{text}\n" for i, text in enumerate(captions)))
    samples = find_samples(DataSource([str(table)]))
    encoded = []
    for name in ("encode_image", "encode_text"):
        encode = getattr(model, name)
        monkeypatch.setattr(model, name, lambda x, encode=encode: encoded.append(len(x)) or encode(x))
    evaluator = Evaluator(model, batch=2)
    texts, (images, read) = evaluator.texts(captions), evaluator.images(samples, range(5))
    assert encoded == [2, 1, 1] and read.tolist() == [*range(5)]
    for rows, first in ((texts, [0, 1, 0, 0, 0]), (images, [0, 0, 2, 0, 0])):
        assert torch.equal(rows, rows[first]) and len(rows.unique(dim=0)) == 2

    # of four captions that are level one is the image's own
    monkeypatch.setattr(evaluation, "CELLS", 1)
    found = retrieval(evaluator, samples)
    level = hit_rates(images.double(), texts.double(), torch.arange(5), torch.arange(5), (1,))[1]
    assert found["image_to_text_recall@1"] == pytest.approx(level, abs=1e-12)


@pytest.mark.parametrize("width", [37, 64, 100])
@pytest.mark.parametrize("cells", [1, 1 << 24])
def test_equal_keys_are_level_in_every_tile(monkeypatch, width, cells):
    monkeypatch.setattr(evaluation, "CELLS", cells)
    for count in (2, 7, 15, 17, 33, 97):
        keys = torch.randn(1, width).repeat(count, 1)
        found = hit_rates(torch.randn(5, width), keys, torch.arange(5) % count, torch.arange(count), (1,))
        assert found[1] == pytest.approx(1 / count, abs=1e-12)


def test_classes_come_from_folders_captions_or_a_file(tmp_path):
    data, file = write_classes(tmp_path / "data", 6), tmp_path / "classes.txt"
    samples = find_samples(DataSource([str(data)]))
    file.write_text("navy\nolive\nmaroon\n")
    assert class_names(samples, file)[0] == ["navy", "olive", "maroon"]
    file.write_text("dark_red\tmaroon\ndark_blue\tnavy\ndark_green\tdark olive\nmore\tx\n")
    assert class_names(samples, file)[0] == ["navy", "dark olive", "maroon"]
    file.write_text("a\nb\n")
    with pytest.raises(CommandError, match="2 classes, but the data has 3 folders"):
        class_names(samples, file)
    file.write_text("dark_red\tx\n")
    with pytest.raises(CommandError, match="no class for 2 folders: dark_blue, dark_green"):
        class_names(samples, file)

    table = tmp_path / "labels.csv"
    table.write_text("path,label\n1.png,cat\n2.png,dog\n3.png,cat\n4.png,\n")
    samples = find_samples(DataSource([str(table)]))
    names, labels = class_names(samples)
    assert names == ["cat", "dog"] and labels.tolist() == [0, 1, 0, -1]
    file.write_text("cow\ncat\ndog\n")
    assert class_names(samples, file)[1].tolist() == [1, 2, 1, -1]
    file.write_text("cat\n")
    with pytest.raises(CommandError, match="lacks 1 class of the data: dog"):
        class_names(samples, file)


def test_nothing_readable_is_an_error(model, tmp_path):
    (tmp_path / "t.csv").write_text("path,label\n1.png,cat\n")
    samples = find_samples(DataSource([str(tmp_path / "t.csv")]))
    for function in (zero_shot, retrieval):
        with pytest.raises(CommandError, match=r"can be read"):
            function(Evaluator(model), samples)


def test_eval_prints_a_table_and_json(model, tmp_path, capsys):
    clipfast.save(model, tmp_path / "m.pt")
    classes, pairs = write_classes(tmp_path / "c", 6), write_folder(tmp_path / "p", 6)
    (pairs / "a" / "001.txt").unlink()
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    arguments = ["eval", "--model", str(tmp_path / "m.pt"), "--device", "cpu", "--workers", "0"]
    arguments += ["--zero-shot", str(classes), "--retrieval", str(pairs)]
    arguments += ["--templates-file", str(tmp_path / "templates.txt")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
    told = capsys.readouterr()
    written = json.loads((tmp_path / "out.json").read_text())
    table = dict(re.findall(r"^(\S.*\S)  +([\d.]+)(?: %)?$", told.out, re.MULTILINE))
    assert table["zero shot top1"] == f"{100 * written['zero-shot']['zero_shot_top1']:.2f}"
    assert table["text to image recall@5"] == f"{100 * written['retrieval']['text_to_image_recall@5']:.2f}"
    assert table["skipped"] == "1" and len(table) == 12
    assert told.err == f"clipfast: skipped: {pairs}/a/001.png: {pairs}/a/001.txt: No such file or directory\n"
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written
    assert written["zero-shot"] == zero_shot(Evaluator(model), find_samples(DataSource([str(classes)])), TEMPLATES)
    assert written["retrieval"]["images"] == 5
    assert [sample["name"] for sample in written["bad_samples"]] == [str(pairs / "a" / "001.png")]


def test_eval_says_what_it_lacks(tmp_path, capsys):
    assert cli.main(["eval"]) == 2
    assert "give --zero-shot, --retrieval, or both" in capsys.readouterr().err
    assert cli.main(["eval", "--zero-shot", str(tmp_path / "none")]) == 1
    assert "none is not a folder" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("a {} and {}\n")
    assert cli.main(["eval", "--zero-shot", str(tmp_path), "--templates-file", str(tmp_path / "t.txt")]) == 1
    assert "expected {} once" in capsys.readouterr().err
