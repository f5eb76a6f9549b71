"""The README's tables and pictures of GPU runs: the newest contest of each group, and no ratio across two."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from clipfast.bench import gpu_report, report

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
COLUMNS = ["date", "commit", "gpu", "torch", "triton", "stage", "operator", "model", "batch", "captions", "dtype"]
COLUMNS += ["contestant", "status", "median_s", "of_floor", "note"]


def write(folder, name, rows, date="2026-01-01", gpu="Card A"):
    shared = {"date": date, "commit": "abc", "gpu": gpu, "torch": "2.11.0", "triton": "3.6.0", "stage": "towers"}
    shared |= {"operator": "encode_image", "model": "M", "batch": 8, "dtype": "float16", "status": "ok"}
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({**shared, **row} for row in rows)


def row(contestant, seconds="", **more):
    return {"contestant": contestant, "median_s": seconds, **more}


def lines(folder):
    return gpu_report.section(folder, "r", {path.name for path in folder.glob("*.svg")}).splitlines()


def test_the_ratios_of_the_committed_runs_are_those_of_their_rounds():
    found = gpu_report.read(RESULTS)
    assert found
    for contest in found:
        medians = {row["contestant"]: float(row["median_s"]) for row in contest.rows if row["median_s"]}
        for timed in (row for row in contest.rows if row["median_s"]):
            ratio = medians[timed["contestant"]] / medians["clipfast"]
            assert ratio == pytest.approx(float(timed["ours_is_faster"]), rel=1e-4)


def test_of_the_two_committed_runs_of_a_day_the_later_counts():
    chosen = {contest.group[1:]: contest.rows[0]["file"] for contest in gpu_report.newest(gpu_report.read(RESULTS))}
    first, second = "h100-80gb-hbm3-2026-11-28.csv", "h100-80gb-hbm3-2026-11-28_graphs.csv"
    b32 = ("ViT-B/32", "image", "", "bfloat16")
    found = [chosen[(*b32, batch, compiled)] for batch, compiled in ((256, False), (256, True), (32, False))]
    assert found == [second, first, first]


def test_a_table_has_ratios_the_floor_losses_and_what_was_not_timed(tmp_path):
    rows = [
        row("absent", status="missing", note="absent is not installed"),
        row("clipfast", 0.5, of_floor=0.427),
        row("openai-clip", 1.0, of_floor=0.2),
        row("faster", 0.25, of_floor=0.8),
        row("clipfast, torch backend", 0.4),
        row("broken", status="WRONG"),
        row("raised", status="failed"),
        row("late", status="skipped"),
    ]
    write(tmp_path, "a.csv", rows)
    (tmp_path / "other.csv").write_text("date,rows\n2026-01-01,3\n")
    text = lines(tmp_path)
    assert "| | image float16, batch 8 |" in text and "**M** ([a.csv](r/a.csv))" in text
    assert "| **clipfast** | **16** |" in text and "| openai-clip | 8 (2.00x) |" in text
    assert "| faster | 32 (0.50x) |" in text and "| clipfast's share of the floor | 43% |" in text
    assert {"| broken | WRONG |", "| raised | failed |", "| late | out of time |"} < set(text)
    where = "in image float16, batch 8 to"
    lost = f"{where} clipfast, torch backend (1.25x as fast); {where} faster (2x as fast)."
    assert f"**clipfast loses** {lost}" in text
    assert (
        "From [a.csv](r/a.csv): 2026-01-01, commit abc, torch 2.11.0, Triton 3.6.0. "
        "Missing: absent (absent is not installed)."
    ) in text


def test_who_was_timed_in_part_on_pytorch_is_marked(tmp_path):
    why = "linear on PyTorch, since _linear_fwd_kernel: row 3 is wrong"
    write(tmp_path, "a.csv", [row("clipfast", 0.5, note=why), row("openai-clip", 1.0)])
    (tmp_path / "a.json").write_text(json.dumps({"notes": [f"towers: M image, batch 8: {why}"]}))
    text = lines(tmp_path)
    assert "| **clipfast** | **16**, in part on PyTorch |" in text
    assert any(line.startswith("From [a.csv]") and why in line for line in text)


def test_the_newest_run_counts_whole(tmp_path):
    write(tmp_path, "c-2026-01-01.csv", [row("clipfast", 1.0), row("peer", 2.0), row("gone", 4.0)])
    write(tmp_path, "c-2026-01-01-2.csv", [row("clipfast", 0.5), row("peer", 1.5)])
    assert {"| **clipfast** | **16** |", "| peer | 5.33 (3.00x) |"} < set(lines(tmp_path))
    # no figure of the older run, neither as a line nor in a ratio
    assert "gone" not in "\n".join(lines(tmp_path)) and "[c-2026-01-01.csv]" not in "\n".join(lines(tmp_path))
    # the tenth run of a day follows the second
    write(tmp_path, "c-2026-01-01-10.csv", [row("clipfast", 0.25)])
    assert "| **clipfast** | **32** |" in lines(tmp_path)


def test_a_run_without_clipfast_replaces_none_and_gives_no_ratio(tmp_path):
    write(tmp_path, "a.csv", [row("clipfast", 1.0), row("peer", 2.0)])
    write(tmp_path, "b.csv", [row("clipfast", status="skipped"), row("peer", 1.0)], date="2026-01-02")
    write(tmp_path, "c.csv", [row("peer", 1.0, batch=1)], date="2026-01-02")
    text = lines(tmp_path)
    assert "| peer | 4 (2.00x) |" in text and "| peer | 1 |" in text


def test_no_ratio_crosses_two_files(tmp_path):
    write(tmp_path, "a.csv", [row("clipfast", 1.0)])
    write(tmp_path, "b.csv", [row("peer", 2.0)])
    text = "\n".join(lines(tmp_path))
    assert "| **clipfast** | **8** |" in text and "x)" not in text


def test_a_wrong_result_is_not_hidden_behind_an_older_time(tmp_path):
    write(tmp_path, "a.csv", [row("clipfast", 1.0), row("peer", 2.0)])
    write(tmp_path, "b.csv", [row("clipfast", status="WRONG"), row("peer", 1.0)], date="2026-01-02")
    text = lines(tmp_path)
    assert "| **clipfast** | WRONG |" in text and "| peer | 8 |" in text and "[a.csv]" not in "\n".join(text)


def test_compilers_have_rounds_of_their_own(tmp_path):
    rows = [row("late torch.compile", status="skipped"), row("clipfast", 1.0), row("peer", 2.0)]
    rows += [row("clipfast", 0.5), row("peer", 2.0), row("peer torch.compile", 0.25)]
    write(tmp_path, "a.csv", rows)
    text = lines(tmp_path)
    assert "| | image float16, batch 8 | image float16, batch 8, beside compilers |" in text
    assert {"| **clipfast** | **8** | **16** |", "| peer | 4 (2.00x) | 4 (4.00x) |"} < set(text)
    assert "| peer torch.compile |  | 32 (0.50x) |" in text
    # a newer run without compilers leaves theirs
    write(tmp_path, "b.csv", [row("clipfast", 0.25), row("peer", 2.0)], date="2026-01-02")
    text = lines(tmp_path)
    assert "| peer torch.compile | 32 (0.50x) |" in text and "| peer | 4 (8.00x) |" in text


def test_each_card_has_its_own_part_the_newest_first(tmp_path):
    write(tmp_path, "a.csv", [row("clipfast", 1.0), row("peer", 2.0)])
    write(tmp_path, "b.csv", [row("clipfast", 0.5), row("peer", 0.75)], date="2026-01-02", gpu="Card B")
    text = lines(tmp_path)
    assert [line for line in text if line.startswith("### ")] == ["### Card B", "### Card A"]
    assert text.index("| peer | 10.7 (1.50x) |") < text.index("### Card A") < text.index("| peer | 4 (2.00x) |")


def test_wide_tables_part_between_towers_and_dtypes(tmp_path):
    rows = [row("clipfast", 1.0, batch=batch, dtype=d) for d in ("bfloat16", "float16") for batch in (1, 8, 32, 256)]
    rows += [row("clipfast", 1.0, operator="encode_text", captions="8-24"), row("clipfast", 1.0, operator="train_step")]
    rows += [row("clipfast", 1.0, operator="linear")]
    write(tmp_path, "a.csv", rows)
    headings = [line.split(" | ") for line in lines(tmp_path) if line.startswith("| | ")]
    assert [len(heading) - 1 for heading in headings] == [4, 6]
    assert headings[1][-2:] == ["text (8-24) float16, batch 8", "train step float16, batch 8 |"]


@pytest.mark.parametrize(
    ("rows", "gpu"), [([row("clipfast", 1.0)], "none"), ([row("clipfast", 1.0, operator="linear")], "Card A")]
)
def test_without_towers_of_a_gpu_it_says_that_none_has_run(rows, gpu, tmp_path):
    write(tmp_path, "a.csv", rows, gpu=gpu)  # a dry run, which has no GPU; a run of operators alone
    assert lines(tmp_path) == ["On a GPU: not yet run on a GPU."]
    assert gpu_report.draw(tmp_path) == []


def test_what_else_went_wrong_in_a_run_is_said(tmp_path):
    write(tmp_path, "a.csv", [row("clipfast", 1.0)])
    assert "something wrong" not in "\n".join(lines(tmp_path))
    stages = [{"stage": "towers", "outcome": "done"}, {"stage": "compiled", "outcome": "not run: out of time"}]
    found = {"failures": ["linear is wrong", "a mask is"], "stages": stages}
    found["notes"] = ["towers: x is missing", "towers: out of time before 1 of 9: M text"]
    (tmp_path / "a.json").write_text(json.dumps(found))
    text = "\n".join(lines(tmp_path))
    assert "**2 of its checks found something wrong**, see [a.json](r/a.json). " in text
    assert "Stages that did not end as planned: compiled (not run: out of time). " in text
    assert "towers: out of time before 1 of 9: M text." in text and "x is missing" not in text


def test_who_is_missing_is_said_though_only_one_row_says_it(tmp_path):
    away = row("away", status="missing", note="away is not installed")
    write(tmp_path, "a.csv", [away, row("clipfast", 1.0), row("clipfast", 1.0, batch=1)])
    write(tmp_path, "b.csv", [row("clipfast", 1.0)], date="2026-01-02")
    (line,) = [line for line in lines(tmp_path) if line.startswith("From [a.csv]")]
    assert line.endswith("Missing: away (away is not installed).")


def test_pictures_have_a_panel_for_what_was_timed_in_two_batches(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(name, 1.0, batch=batch, of_floor=0.5) for batch in (1, 8) for name in ("clipfast", "peer")]
    rows += [row("clipfast", 0.5, operator="encode_text", captions="8-24"), row("clipfast, graphs off", 2.0)]
    # beside a compiler everybody is timed anew
    rows += [row(name, 0.25, of_floor=0.75) for name in ("clipfast", "peer", "peer torch.compile")]
    write(tmp_path, "a.csv", rows)
    write(tmp_path, "b.csv", [row("clipfast", 1.0)])
    panels = gpu_report.panels(c for c in gpu_report.read(tmp_path) if c.rows[0]["file"] == "a.csv")
    assert list(panels) == ["M image, float16"]
    found = {(int(row["batch"]), row["contestant"]): row["samples_per_s"] for row in panels["M image, float16"]}
    assert found == {(1, "clipfast"): 1, (1, "peer"): 1} | dict.fromkeys(
        [(8, "clipfast"), (8, "peer"), (8, "peer torch.compile")], 32
    )
    written = gpu_report.draw(tmp_path)
    assert {path.name for path in written} == {f"a-{k}.{s}" for k in ("throughput", "floor") for s in ("png", "svg")}
    first = {path: path.read_bytes() for path in written}
    gpu_report.draw(tmp_path)
    assert {path: path.read_bytes() for path in written} == first
    assert "![Share of the floor by batch size on Card A, all of a](r/a-floor.svg)" in lines(tmp_path)


def test_what_is_drawn_is_what_the_rows_say():
    pytest.importorskip("matplotlib")
    from clipfast.bench import plots

    rows = [{"contestant": n, "batch": b, "samples_per_s": 10 * b, "of_floor": "0.5"} for n in "ab" for b in (8, 1)]
    rows[0]["of_floor"] = ""  # no ceilings, no share
    style = plots._style(["a", "b"])
    for figure, values in (
        (plots.throughput([("it", rows)], style, "Card"), {"a": [10, 80], "b": [10, 80]}),
        (plots.floors([("it", rows)], style, "Card"), {"a": [0.5], "b": [0.5, 0.5]}),
    ):
        (axis,) = figure.axes
        assert {line.get_label(): [*line.get_ydata()] for line in axis.lines} == values
        assert axis.get_title() == "it" and figure.get_suptitle() == "Card" and axis.get_xscale() == "log"


def test_the_part_of_the_gpus_follows_that_of_the_cpus():
    text = report.made(RESULTS, "benchmarks/results")
    assert text.endswith(gpu_report.section(RESULTS, "benchmarks/results", {p.name for p in RESULTS.glob("*.svg")}))
    assert text.index("On AMD EPYC") < text.index("### NVIDIA H100 80GB HBM3")
