"""What cannot work is said in one line, before anything is trained."""

from __future__ import annotations

import json

import pytest

from clipfast import cli

from .runs import arguments


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--model", "ViT-Z/1"], "unknown architecture 'ViT-Z/1': RN50, "),
        (["--model", "none.json"], "none.json: No such file"),
        (["--model", "{data}/broken.json"], "broken.json is not JSON"),
        (["--model", "{data}/odd.json"], "unknown colour, no embed_dim"),
        (["--model", "{data}/heads.json"], "transformer_heads must be transformer_width // 64 = 1"),
        (["--model", "ViT-B/32", "--init", "{whole}/model.pt"], "is not a ViT-B/32: "),
        (["--model", "{data}/ids.json"], "vocabulary has 50 ids, the tokenizer's 49408"),
        (["--init", "{data}/tiny.json"], "tiny.json is "),
        (["--data", "{data}/nothing"], "no data: {data}/nothing is not a folder"),
        (["--out", "{data}/tiny.json"], "tiny.json: is a file, and a folder is wanted"),
        (["--batch-size", "27"], "26 samples, fewer than one batch of 27"),
        (["--precision", "amp_fp16"], "amp_fp16 is for GPUs"),
        (["--zero-shot", "{data}/nothing"], "no data: {data}/nothing"),
        (
            ["--zero-shot", "{data}/classes", "--classes", "{data}/colours.txt"],
            "has 2 classes, but the data has 3 folders",
        ),
        (["--device", "cuda:99"], "device 'cuda:99' is not here"),
    ],
)
def test_a_mistake_is_one_line_and_early(data, whole, tmp_path, capsys, more, text):
    tiny = json.loads((data / "tiny.json").read_text())
    for name, content in (
        ("odd", {"colour": 1}),
        ("heads", {**tiny, "transformer_heads": 2}),
        ("ids", {**tiny, "vocab_size": 50}),
    ):
        (data / f"{name}.json").write_text(json.dumps(content))
    (data / "broken.json").write_text("{")
    (data / "colours.txt").write_text("red\ngreen\n")
    words = arguments(data, tmp_path / "new")
    if more[0] == "--init":
        del words[words.index("--model") : words.index("--model") + 2]
    words += [word.format(data=data, whole=whole) for word in more]
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert told.startswith("clipfast: ") and told.count("\n") == 1
    assert text.format(data=data) in told


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "--data, --out"),
        (["--data", "x", "--out", "y"], "give --model, --init, or both"),
        (["--data", "x", "--out", "y", "--lr", "0"], "expected a number above 0, got '0'"),
        (["--data", "x", "--out", "y", "--beta2", "1"], "from 0 to below 1, got '1'"),
        (["--data", "x", "--out", "y", "--workers", "-1"], "at least 0, got '-1'"),
        (["--data", "x", "--out", "y", "--steps", "3", "--epochs", "2"], "not allowed with"),
        (["--data", "x", "--out", "y", "--template", "a photo"], "{} once"),
        (["--data", "x", "--out", "y", "--model", "RN50", "--crop-scale", "0.9", "0.5"], "0.9 is more than 0.5"),
    ],
)
def test_wrong_usage_is_status_2(more, text, capsys):
    assert cli.main(["train", *more]) == 2
    assert text in capsys.readouterr().err
