"""Matrix products of a CPU: what is timed beside what, what the files say, and the README's tables of them."""

from __future__ import annotations

import csv
import itertools
import time
from pathlib import Path

import pytest
import torch

from benchmarks import linear, on_this_cpu
from clipfast import dispatch
from clipfast.bench import ceilings, environment, product_report, report
from clipfast.kernels import cpu_library

ROOT = Path(__file__).resolve().parents[1]

needs_library = pytest.mark.skipif(cpu_library.missing() is not None, reason="libclipfast_cpu is not built")


class SlowReading(ceilings.Reading):
    """It takes a millisecond for each weight, if it reads the weights of a block: all others fit into that."""

    def __call__(self, tensor):
        assert tensor.numel() in (3 * 64 * 64, 64 * 64, 4 * 64 * 64, 32 * 48, 32 * 16)
        super().__call__(tensor)
        time.sleep(1e-3)


@pytest.fixture
def fast(monkeypatch):
    """A block 64 wide, and a machine that is known; one thread, which waits for no other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(linear, "WIDTHS", {"ViT-B/32": 64})
    slow = SlowReading(8e9, 1, 0)
    monkeypatch.setattr(ceilings, "fastest_reading", lambda n_bytes: None if cpu_library.missing() else slow)
    monkeypatch.setattr(ceilings, "multiply_adds_per_s", lambda dtype, seconds, threads, form: threads * 1e9)
    yield
    torch.set_num_threads(threads)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@needs_library
def test_a_run_writes_a_row_for_each_contestant_with_its_shares(fast, tmp_path, capsys):
    path = tmp_path / "a-linear.csv"
    assert linear.main(["--quick", "--csv", str(path), "--old", str(ROOT), "--dtypes", "float32,bfloat16"]) == 0
    rows = rows_of(path)
    assert set(rows[0]) == set(linear.COLUMNS) and set(linear.COLUMNS) >= product_report.NEEDED
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    assert {"F.linear", "clipfast", "clipfast prepacked"} < set(names) and "clipfast " in names[-1]
    assert {(row["dtype"], row["block"], row["rows"]) for row in rows} == {
        (dtype, "ViT-B/32", n) for dtype in ("float32", "bfloat16") for n in ("1", "50")
    }
    for row in rows:
        assert row["status"] == "ok" and row["cpu_kind"] == environment.cpu_kind(), row
        assert row["instructions"] == cpu_library.best() and row["inputs"] == "64" and row["outputs"] == ""
        median, weights = float(row["median_s"]), 12 * 64 * 64 * (4 if row["dtype"] == "float32" else 2)
        assert float(row["gb_per_s"]) == pytest.approx(weights / median / 1e9, rel=1e-4)
        read = float(row["read_gb_per_s"])
        assert 0 < read <= weights / 4e-3 / 1e9
        assert float(row["of_read"]) == pytest.approx(float(row["gb_per_s"]) / read, rel=1e-3)
        gflops = 2 * int(row["rows"]) * 12 * 64 * 64 / median / 1e9
        assert float(row["of_peak"]) == pytest.approx(gflops, rel=1e-4)
        assert float(row["rel_rms"]) < (1e-6 if row["dtype"] == "float32" else 1e-2)
    shown = capsys.readouterr().out
    assert "of reading" in shown and "share of the peak" in shown and "% " in shown and ", reads " in shown
    text = product_report.section(tmp_path, "r")
    assert "| ViT-B/32, 50 rows | " in text and "([a-linear.csv](r/a-linear.csv))" in text


@needs_library
def test_single_products_and_another_form(fast, tmp_path):
    path = tmp_path / "a.csv"
    arguments = ["--quick", "--shapes", "3x32x48,3x32x16", "--dtypes", "float32", "--instructions", "baseline"]
    assert linear.main([*arguments, "--csv", str(path)]) == 0
    found = {(row["block"], row["rows"], row["inputs"], row["outputs"], row["instructions"]) for row in rows_of(path)}
    assert found == {("", "3", "32", "48", "baseline"), ("", "3", "32", "16", "baseline")}
    assert "not yet measured" in product_report.section(tmp_path, "r") and "|" not in product_report.section(
        tmp_path, "r"
    )


def test_without_the_library_there_is_what_the_package_runs_and_no_share(fast, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_library, "missing", lambda: "not built")
    # what is decided here is no other test's
    monkeypatch.setattr(dispatch, "_decisions", {})
    path = tmp_path / "a.csv"
    assert linear.main(["--quick", "--dtypes", "float32", "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert {"F.linear", "clipfast"} <= {row["contestant"] for row in rows} <= {"F.linear", "oneDNN fused", "clipfast"}
    assert all(row["status"] == "ok" and row["gflops"] and row["of_peak"] == row["of_read"] == "" for row in rows)
    with pytest.raises(SystemExit):
        linear.main(["--instructions", "avx2"])
    assert "not built" in capsys.readouterr().err


@needs_library
def test_a_block_is_met_again_after_all_others_whoever_multiplies():
    bench = linear.Bench("best", None, 3, {}, {}, None, 1000, True)
    copies = linear.layers(((8, 8), (8, 4)), torch.float32, bench)
    assert sum(layer.weight.nbytes for copy in copies[1:] for layer in copy) >= 1000
    for number, copy in enumerate(copies):
        for layer in copy:
            layer.weight.fill_(number)
            layer.bias.zero_()
            assert layer.packed is not layer.weight and layer.packed.data_ptr() == layer.weight.data_ptr()
    xs = [torch.full((2, 8), 0.125)] * 2
    with torch.no_grad():
        ways = linear._blocks(linear.Work("", 2, ((8, 8), (8, 4))), copies, xs, bench)
        met = [ways[name]()[1][0, 0].item() for name in [*ways, *ways, *ways]]
    assert met == list(itertools.islice(itertools.cycle(range(len(copies))), len(met)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--old", "nowhere"], "nowhere has no clipfast/kernels/cpu_library.py"),
        (["--shapes", "3x4"], "rows x inputs x outputs, got '3x4'"),
        (["--rows", "0"], "at least 1"),
        (["--dtypes", "int8"], "float32, bfloat16"),
    ],
)
@needs_library
def test_what_cannot_be_measured_is_named(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        linear.main(arguments)
    assert expected in capsys.readouterr().err


@needs_library
@pytest.mark.parametrize(
    ("text", "expected"),
    [("raise OSError('gone')", "does not import: gone"), (None, "is not built")],
)
def test_another_checkout_that_cannot_be_called_is_named(text, expected, tmp_path, capsys):
    folder = tmp_path / "clipfast" / "kernels"
    folder.mkdir(parents=True)
    (folder / "cpu_library.py").write_text(text or Path(cpu_library.__file__).read_text())
    with pytest.raises(SystemExit):
        linear.main(["--old", str(tmp_path)])
    assert expected in capsys.readouterr().err


INTEL = "model name : Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\ncpu family : 6\nmodel : 143\nflags : "
AVX512 = "avx2 fma avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{INTEL}{AVX512} avx512_bf16 amx_tile amx_bf16", "intel-xeon-platinum-8481c-6-143-amx"),
        (f"{INTEL}{AVX512}", "intel-xeon-platinum-8481c-6-143-avx512"),
        (f"{INTEL}avx2 fma avx512f", "intel-xeon-platinum-8481c-6-143-avx2"),
        (f"{INTEL}sse2", "intel-xeon-platinum-8481c-6-143-baseline"),
        (
            f"cpu family : 26\nmodel : 2\nmodel name : AMD EPYC\nflags : {AVX512} avx512_bf16\n\nmodel : 3",
            "amd-epyc-26-2-avx512_bf16",
        ),
        ("processor : 0\nBogoMIPS : 50", "some-arm"),
    ],
)
def test_a_cpu_is_named_by_what_tells_it_from_others(text, kind, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(environment.platform, "processor", lambda: "Some ARM")
    assert environment.cpu_kind() == kind


def test_all_of_a_cpu_goes_to_files_with_its_name_and_avx2_is_held_in_a_process_of_its_own(tmp_path):
    (tmp_path / "a-avx512-2026-01-01-linear.csv").touch()
    first, held, models = on_this_cpu.parts(tmp_path, "a-avx512", "2026-01-01", quick=False)
    assert first.arguments == ("benchmarks.linear", "--csv", str(tmp_path / "a-avx512-2026-01-01-linear-2.csv"))
    assert not first.variables and held.variables == on_this_cpu.AVX2
    assert held.arguments[2:] == (str(tmp_path / "a-avx512-2026-01-01-linear-avx2.csv"), "--instructions", "avx2")
    assert models.arguments[:2] == ("clipfast", "bench") and models.arguments[-1] == "a-avx512-2026-01-01"
    assert len(on_this_cpu.parts(tmp_path, "a-avx2", "2026-01-01", quick=False)) == 2
    assert all("--quick" in part.arguments for part in on_this_cpu.parts(tmp_path, "a-amx", "2026-01-01", quick=True))


def test_a_folder_that_is_a_file_is_named_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        on_this_cpu.main(["--out", str(tmp_path / "file")])
    assert "is a file, and a folder is wanted" in capsys.readouterr().err


def test_a_part_that_fails_keeps_no_other_from_running(capfd):
    failing = on_this_cpu.Part("this", ("timeit", "--no-such-option"))
    other = on_this_cpu.Part("that", ("this",), {"SAID": "so"})
    assert on_this_cpu.run([failing, other]) == 2
    out, error = capfd.readouterr()
    assert "this: exit status 2" in error and "Namespaces are one honking great idea" in out


def write(folder: Path, name: str, kind: str, **more: str) -> None:
    row = {
        "date": "2026-01-01",
        "cpu": "A CPU",
        "cpu_kind": kind,
        "threads": "2",
        "torch": "2.0+cpu",
        "dtype": "float32",
    }
    row |= {"instructions": "avx2", "block": "ViT-B/32", "rows": "8", "contestant": "clipfast", "status": "ok"}
    row |= {"capability": "AVX2", "of_peak": "0.125", "of_read": "0.75"} | more
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)


def test_the_readme_has_the_newest_products_and_says_which_cpus_have_none(tmp_path):
    write(tmp_path, "a-linear.csv", "amd-epyc-25-1-avx2")
    write(tmp_path, "a-linear-2.csv", "amd-epyc-25-1-avx2", rows="50")
    # held to AVX2: the CPU is another kind all the same
    write(tmp_path, "b-linear-avx2.csv", "amd-epyc-25-17-avx512_bf16")
    write(
        tmp_path, "b-linear.csv", "amd-epyc-25-17-avx512_bf16", instructions="avx512_bf16", of_peak="", status="failed"
    )
    lines = product_report.section(tmp_path, "r").splitlines()
    assert "| ViT-B/32, 50 rows | 12.5% |" in lines and "| ViT-B/32, 8 rows | 12.5%, reads 75% |" in lines
    assert "| ViT-B/32, 8 rows | failed |" in lines
    headings = [line for line in lines if line.startswith("float32 on A CPU")]
    assert [line.partition("](")[0].partition("[")[2] for line in headings] == [
        "a-linear-2.csv",
        "b-linear.csv",
        "b-linear-avx2.csv",
    ]
    assert lines[-2:] == [f"- not yet measured on {name}" for name in list(product_report.WANTED)[1:]]
    write(tmp_path, "c-linear.csv", "amd-epyc-26-2-avx512_bf16")
    write(tmp_path, "d-linear.csv", "intel-xeon-6-143-amx")
    assert "not yet measured" not in product_report.section(tmp_path, "r")


def test_two_kinds_of_cpu_of_one_name_have_tables_of_their_own():
    shared = {"file": "a.csv", "date": "2026-01-01", "cpu": "A CPU", "threads": "2", "torch": "2.0+cpu", "model": "M"}
    shared |= {"tower": "image", "dtype": "float32", "batch": "1", "contestant": "clipfast", "status": "ok"}
    shared |= {"rel_rms": "1e-7", "p95_s": "", "captions": ""}
    kinds = {"": "1", "a-1": "2", "a-2": "4"}
    rows = [{**shared, "cpu_kind": kind, "median_s": s, "samples_per_s": s} for kind, s in kinds.items()]
    text = report.tables(rows, "r")
    for name, rate in (("A CPU", 1), ("A CPU (a-1)", 2), ("A CPU (a-2)", 4)):
        part = text.partition(f"On {name}, 2 threads")[2].partition("\n\nOn ")[0]
        assert f"| **clipfast** | **{rate}** |" in part and part.count("| M image float32 | 1.0e-7 |  |") == 1
