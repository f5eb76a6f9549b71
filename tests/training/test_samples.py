"""Every format gives the same pairs; what is wrong with the data is said with the names that matter."""

from __future__ import annotations

import csv
import json
import sys
import tarfile

import numpy as np
import pytest

from clipfast.commands import CommandError
from clipfast.training.data import texts_of
from clipfast.training.samples import DataSource, Strings, find_samples
from clipfast.training.shards import ShardSamples, expand

from .pairs import add_member, caption_of, make_image, png, write_classes, write_folder, write_shards

N = 7


def source(*paths, **options) -> DataSource:
    return DataSource([str(path) for path in paths], **options)


def write_table(tmp_path, name, delimiter, columns=("path", "caption"), n=N):
    write_folder(tmp_path / "images", n)
    table = tmp_path / name
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", *columns])
        for number in range(n):
            writer.writerow([number, f"images/{'a' if number % 2 else 'b'}/{number:03}.png", caption_of(number)])
    return table


def write_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    write_folder(tmp_path / "images", N)
    names = [f"images/{'a' if number % 2 else 'b'}/{number:03}.png" for number in range(N)]
    table = pyarrow.table({"path": names, "caption": [caption_of(number) for number in range(N)], "w": [1.0] * N})
    parquet.write_table(table, tmp_path / "pairs.parquet", row_group_size=3)
    return tmp_path / "pairs.parquet"


def shards(tmp_path):
    write_shards(tmp_path / "shards", N)
    return tmp_path / "shards" / "shard-{0..1}.tar"


FORMATS = {
    "folder": lambda tmp_path: write_folder(tmp_path / "images", N),
    "csv": lambda tmp_path: write_table(tmp_path, "pairs.csv", ","),
    "csv with tabs": lambda tmp_path: write_table(tmp_path, "pairs.csv", "\t", ("filepath", "title")),
    "tsv": lambda tmp_path: write_table(tmp_path, "pairs.tsv", "\t"),
    "parquet": write_parquet,
    "shards": shards,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_every_pair_once(name, tmp_path):
    samples = find_samples(source(FORMATS[name](tmp_path)))
    assert len(samples) == N
    found = {}
    for i in range(N):
        number = int(samples.name(i).rpartition("/")[2][:3])
        found[number] = texts_of(samples, i)
        assert np.array_equal(np.asarray(samples.image(i)), np.asarray(make_image(number)))
    assert found == {number: [caption_of(number)] for number in range(N)}
    again = find_samples(source(FORMATS[name](tmp_path)))
    assert [again.name(i) for i in range(N)] == [samples.name(i) for i in range(N)]
    assert again.fingerprint() == samples.fingerprint()


def test_order_of_a_folder_is_sorted(tmp_path):
    samples = find_samples(source(write_folder(tmp_path, N)))
    names = [samples.name(i) for i in range(N)]
    assert names == sorted(names)


@pytest.mark.parametrize("name", FORMATS)
def test_fingerprint_tells_other_data_and_not_another_place(name, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    before = find_samples(source(FORMATS[name](tmp_path / "here"))).fingerprint()
    assert find_samples(source(FORMATS[name](tmp_path / "there"))).fingerprint() == before
    for n in (N - 1, N + 1):
        write_folder(tmp_path / f"{n}", n)
        assert find_samples(source(tmp_path / f"{n}")).fingerprint() != before


def test_class_folders_get_the_templates(tmp_path):
    samples = find_samples(source(write_classes(tmp_path, N), templates=("a {}.", "one {}")))
    assert samples.classes == ["dark blue", "dark green", "dark red"]
    for i in range(N):
        name = samples.classes[samples.labels[i]]
        assert samples.captions(i) == [f"a {name}.", f"one {name}"]
        assert name.replace(" ", "_") in samples.name(i)


def test_lines_of_a_text_are_captions(tmp_path):
    write_folder(tmp_path, 1)
    (tmp_path / "b" / "000.txt").write_text("one\n\n  two \n", "utf-8")
    assert texts_of(find_samples(source(tmp_path)), 0) == ["one", "two"]


def test_parquet_lists_are_several_captions(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": ["x.png"], "captions": [["a", "b"]]}), tmp_path / "t.parquet")
    samples = find_samples(source(tmp_path / "t.parquet"))
    assert [(samples.name(i), samples.captions(i)) for i in range(2)] == [
        (str(tmp_path / "x.png"), ["a"]),
        (str(tmp_path / "x.png"), ["b"]),
    ]


def test_named_columns_win(tmp_path):
    table = write_table(tmp_path, "pairs.csv", ",", ("where", "caption"))
    with pytest.raises(CommandError, match=r"no image column \(.*filepath.*\); its columns are id, where, caption"):
        find_samples(source(table))
    assert len(find_samples(source(table, image_column="where"))) == N
    with pytest.raises(CommandError, match=r"no caption column \(said\); its columns are id, where, caption"):
        find_samples(source(table, image_column="where", caption_column="said"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CommandError, match=r"needs pyarrow: pip install 'clipfast\[train\]'"):
        find_samples(source(tmp_path / "x.parquet"))


def test_expand_braces_globs_and_folders(tmp_path):
    for name in ("s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar", "x.txt"):
        (tmp_path / name).touch()

    def expand_names(*patterns):
        return [path[-7:-4] for path in expand([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert expand_names("s-{009..011}.tar") == ["009", "010", "011"]
    assert expand_names("s-{010,008}.tar") == ["010", "008"]
    assert expand_names("s-0{0..0}{8..9}.tar") == ["008", "009"]
    assert expand_names("s-00?.tar", "s-011.tar") == ["008", "009", "011"]
    assert expand_names("") == ["008", "009", "010", "011"]
    with pytest.raises(CommandError, match=r"there is no shard .*s-012\.tar"):
        expand([f"{tmp_path}/s-{{010..012}}.tar"])


def test_shards_take_captions_as_webdataset_has_them(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, members in {
            "dir/a.b": {"PNG": png(0), "txt": b"one\nline"},
            "c": {
                "json": json.dumps({"text": "from text", "said": ["x", "y"]}).encode(),
                "seg.png": b"",
                "png": png(1),
            },
            "d": {"png": png(2)},
            "e": {"txt": b"no image"},
            "f": {"png": png(3), "json": b"{broken"},
            "g": {"png": png(3), "json": b'{"caption": 3}'},
            "h": {"png": png(3), "json": b"[1]"},
        }.items():
            for suffix, content in members.items():
                add_member(archive, f"{name.replace('.b', '')}.{suffix}", content)
    samples = ShardSamples([str(tmp_path / "s.tar")])
    names = [samples.name(i).rpartition("s.tar/")[2] for i in range(len(samples))]
    assert names == ["dir/a", "c", "d", "f", "g", "h"]
    assert texts_of(samples, 0) == ["one\nline"] and texts_of(samples, 1) == ["from text"]
    assert np.array_equal(np.asarray(samples.image(1)), np.asarray(make_image(1)))
    assert texts_of(ShardSamples([str(tmp_path / "s.tar")], "said"), 1) == ["x", "y"]
    for i, text in ((2, "neither .txt nor .json"), (3, "Expecting"), (4, "no text: 3"), (5, "no field caption")):
        with pytest.raises(ValueError, match=text):
            texts_of(samples, i)


def test_a_shard_that_was_cut_keeps_what_is_whole(tmp_path, capsys):
    path = write_shards(tmp_path, 6, shards=1)[0]
    whole = ShardSamples([str(path)])
    end = int(whole._places[4, 1] + whole._places[4, 2] // 2)
    path.write_bytes(path.read_bytes()[:end])
    samples = ShardSamples([str(path)])
    assert "is damaged" in capsys.readouterr().err
    assert len(samples) == 5
    assert texts_of(samples, 3) == [caption_of(3)]
    assert samples.image(3).size == (44, 36)
    with pytest.raises(ValueError, match="004 is cut short"):
        samples.image(4)


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        add_member(archive, "0.png", png(0))
    with pytest.raises(CommandError, match="no plain tar file"):
        find_samples(source(tmp_path / "s.tar"))


def test_no_data_is_said_with_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.md").touch()
    (tmp_path / "rows.csv").write_text("path,caption\n")
    (tmp_path / "latin.csv").write_bytes(b"path,caption\na.png,caf\xe9\n")
    (tmp_path / "no.parquet").write_text("hello")
    make_image(0).save(tmp_path / "empty.png")
    for name, text in (
        ("missing.csv", "missing.csv is not there"),
        ("missing", "missing is not a folder, a table"),
        ("missing.tar", "there is no shard .*missing.tar"),
        ("note.md", "note.md is not a folder, a table"),
        ("empty", "empty has no images"),
        ("rows.csv", "rows.csv has no rows"),
        ("latin.csv", "latin.csv is not UTF-8"),
        ("no.parquet", "no.parquet is not a Parquet file"),
        ("", r"no captions: .*empty.png has no empty.txt beside it"),
    ):
        with pytest.raises(CommandError, match=text):
            find_samples(source(tmp_path / name))


def test_strings_hold_any_name():
    texts = ["", "plain", "schön \U0001f600", "caf\udce9.png", "\ud800 lone"]
    strings = Strings(texts)
    assert len(strings) == 5 and [strings[i] for i in range(5)] == texts
