"""The README's tables are what the committed results give: newest file, ratios, losses, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from clipfast.bench import plots, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_readme_is_what_the_results_give():
    readme = (ROOT / "README.md").read_text()
    section = report.made(RESULTS, "benchmarks/results")
    assert report.replaced(readme, section) == readme, "run `make readme`"


def test_results_of_before_reading_was_measured_are_drawn_by_copying():
    pytest.importorskip("matplotlib")
    facts = json.loads((RESULTS / "cpu-2026-11-22.json").read_text())
    rows = [row for row in report.read(RESULTS) if row["file"] == "cpu-2026-11-22.csv" and row["median_s"]]
    figure = plots.points(rows, facts["ceilings"], facts.get("ceilings_by", {}))
    assert [axis.get_title() for axis in figure.axes if axis.lines] == [
        f"{name}: {facts['ceilings'][name] / 1e9:.0f} GFLOP/s, 38 GB/s" for name in ("float32", "bfloat16")
    ]


def write(folder, name, date, rows):
    columns = ["date", "cpu", "threads", "torch", "model", "tower", "dtype", "batch", "captions", "contestant"]
    columns += ["status", "median_s", "samples_per_s", "rel_rms"]
    shared = {"date": date, "cpu": "A CPU", "threads": 2, "torch": "2.0+cpu", "model": "M", "tower": "image"}
    shared |= {"dtype": "float32", "batch": 8, "captions": "", "status": "ok"}
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({**shared, **row} for row in rows)


def row(contestant, seconds, **more):
    return {"contestant": contestant, "median_s": seconds, "samples_per_s": 8 / seconds if seconds else "", **more}


def test_tables_show_ratios_losses_and_what_was_not_timed(tmp_path):
    rows = [
        row("clipfast", 0.5, rel_rms=2e-7),
        row("openai-clip", 1.0, rel_rms=4e-7),
        row("faster", 0.25),
        row("rough", 0.125, status="approximate"),
        row("broken", "", status="WRONG"),
        row("late", "", status="skipped"),
        row("absent", "", status="missing"),
    ]
    write(tmp_path, "a.csv", "2026-01-01", rows)
    (tmp_path / "a-linear.csv").write_text("date,rows\n2026-01-01,3\n")
    text = report.tables(report.read(tmp_path), "results")
    assert "On A CPU, 2 threads, torch 2.0: " in text and "[a.csv](results/a.csv)" in text
    lines = text.splitlines()
    assert "| **clipfast** | **16** |" in lines and "| openai-clip | 8 (2.00x) |" in lines
    assert "| faster | 32 (0.50x) |" in lines and "| rough | 64 (0.25x, approximate) |" in lines
    assert "| broken | WRONG |" in lines and "| late | out of time |" in lines and "absent" not in text
    lost = "in image float32 to faster (2x as fast); in image float32 to rough (4x as fast, approximate)"
    assert f"**clipfast loses** {lost}." in lines
    assert "| M image float32 | 2.0e-7 | 4.0e-7 |" in lines


def test_the_newest_file_counts_group_by_group(tmp_path):
    write(tmp_path, "a.csv", "2026-01-01", [row("clipfast", 1.0), row("clipfast", 1.0, batch=1, samples_per_s=1)])
    write(tmp_path, "b.csv", "2026-01-02", [row("clipfast", 0.5), row("clipfast", "", batch=1, status="skipped")])
    found = {(r["batch"], r["file"], r["median_s"]) for r in report.newest(report.read(tmp_path))}
    assert found == {("8", "b.csv", "0.5"), ("1", "a.csv", "1.0")}


def test_the_second_run_of_a_day_is_newer(tmp_path):
    write(tmp_path, "a-2026-01-01.csv", "2026-01-01", [row("clipfast", 1.0)])
    write(tmp_path, "a-2026-01-01-2.csv", "2026-01-01", [row("clipfast", 0.5)])
    (found,) = report.newest(report.read(tmp_path))
    assert found["file"] == "a-2026-01-01-2.csv"


def test_latency_start_and_pictures_are_shown_where_they_are(tmp_path):
    write(tmp_path, "a.csv", "2026-01-01", [row("clipfast", 0.5, batch=1)])
    rows = report.read(tmp_path)
    rows[0] |= {"p95_s": "0.75", "p99_s": "", "rounds": "40"}
    assert "| M image float32 | clipfast | 500 | 750 |  | 40 |" in report.tables(rows, "r").splitlines()
    columns = ["date", "model", "dtype", "contestant", "status", "import_s", "first_image_s", "second_image_s"]
    columns += ["first_text_s", "second_text_s", "peak_bytes", "cpu", "threads", "torch"]
    values = ["2026-01-01", "M", "float32", "clipfast", "ok", "0.125", "0.5", "0.25", "0.2", "0.1", str(2**30)]
    values += ["A CPU", "2", "2.0+cpu"]
    (tmp_path / "a-start.csv").write_text(",".join(columns) + "\n" + ",".join(values) + "\n")
    (tmp_path / "a-ratios.svg").write_text("<svg/>")
    text = report.made(tmp_path, "r")
    assert "M float32 on A CPU, 2 threads, torch 2.0 ([a-start.csv](r/a-start.csv))" in text
    assert "| clipfast | 0.12 | 500 | 250 | 200 | 100 | 1024 |" in text.splitlines()
    assert "![ratios of a](r/a-ratios.svg)" in text and "roofline" not in text


def test_only_the_section_is_replaced(tmp_path, capsys):
    write(tmp_path, "a.csv", "2026-01-01", [row("clipfast", 1.0)])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "a.csv" in text


def test_a_loss_says_whether_packing_ahead_wins_it_back(tmp_path):
    rows = [row("clipfast", 0.5), row("clipfast prepacked", 0.3), row("faster", 0.25), row("fast", 0.4)]
    write(tmp_path, "a.csv", "2026-01-01", rows)
    lines = report.tables(report.read(tmp_path), "results").splitlines()
    assert "| clipfast prepacked | 26.7 (0.60x) |" in lines
    lost = "to fast (1.25x as fast; prepacked wins); in image float32 to faster (2x as fast; prepacked loses too)"
    assert f"**clipfast loses** in image float32 {lost}." in lines


@pytest.mark.parametrize("text", ["no marks", f"{report.END} {report.BEGIN}", f"{report.BEGIN}"])
def test_a_readme_without_its_marks_is_left_alone(text, tmp_path, capsys):
    write(tmp_path, "a.csv", "2026-01-01", [row("clipfast", 1.0)])
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 1
    assert "expected" in capsys.readouterr().err and readme.read_text() == text


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path), "--readme", str(ROOT / "README.md")]) == 1
    assert "no results" in capsys.readouterr().err
