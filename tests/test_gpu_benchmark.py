"""`make gpu` without a GPU: every stage is wired up, time is kept, what is wrong is reported and never timed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    correctness,
    launch_ids,
    operator_contestants,
    operators,
    problems,
    report,
    run,
    stages,
    timing,
    tune,
)
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.operator_contestants import EAGER, OPENAI, OURS, Contestant
from clipfast import dispatch, tuning
from clipfast.bench import environment
from clipfast.bench.budget import Budget

from .gpu_runs import new_run

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """A run begins when its command is imported: here long ago, when the tests were collected."""
    monkeypatch.setattr(command, "STARTED", time.monotonic())


def rows_of(folder) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


# ---- the command ----


@pytest.mark.parametrize("name", ["headline", "rest"])
def test_a_dry_run_goes_through_every_stage_and_operator(name, tmp_path):
    before = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", name, "--dry-run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(run.DRY) and "failed" not in done.stdout
    for stage in stages.PLANS[name]:
        assert f"] {stage}: " in done.stdout, stage
        assert f"\n{stage} " in done.stdout[: done.stdout.index("[")], "the plan of the time comes first"
    for operator in dispatch.OPERATORS if name == "rest" else ():
        assert f"operators: operator {operator}: ok" in done.stdout, operator
    assert ("tiny image" in done.stdout and "tiny text" in done.stdout) or name == "rest"
    assert "GB/s" not in done.stdout and "TFLOP" not in done.stdout
    assert done.stdout.strip().endswith("no correctness failure") and "checks passed" in done.stdout
    assert {path.name for path in (ROOT / "benchmarks" / "results").iterdir()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert command.main([]) == 2
    text = capsys.readouterr().err
    assert "no GPU" in text and torch.__version__ in text and "--dry-run" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "tower"], "tower"), (["--minutes", "0"], "at least 0.5"), (["--minutes", "nan"], "at least 0.5")],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


# ---- time ----


def test_a_part_ends_with_the_whole():
    clock = Clock()
    whole = Budget(10, clock)
    part = whole.part(8)
    clock.now += 5
    assert (whole.left(), part.left(), part.spent()) == (5, 3, 5)
    late = whole.part(8)
    assert late.left() == 5 and late.allows(5) and not late.allows(6)
    clock.now += 9
    assert whole.left() == late.left() == 0


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    clock = Clock()
    made = new_run(tmp_path, stage="operators", clock=clock)

    def slow(*arguments):
        clock.now += 30
        return {OURS: {"status": "ok"}}

    monkeypatch.setattr(operators, "measure", slow)
    operators.stage(made, made.budget.part(100))
    assert made.evidence.notes[0].startswith("operators: out of time before layer_norm"), made.evidence.notes


def test_rounds_stop_when_time_is_up_but_one_always_runs():
    prepared = {name: timing.Prepared(lambda: None, 1, "cpu") for name in "ab"}
    seconds, failed = timing.time_interleaved(prepared, 9, CPU, lambda: 0.0)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 1, "b": 1} and not failed


def test_a_program_that_takes_too_long_is_ended(tmp_path):
    job = Job(
        "sleeper",
        [sys.executable, "-c", "print('3 passed', flush=True); import time; time.sleep(60)"],
        tmp_path / "log",
    )
    for _ in range(100):
        if job.text():
            break
        torch.randn(10**6).sum()
    status, text = job.wait(0.2)
    assert status is None and text == "cut off, out of time; 3 passed" and job.process.poll() is not None


def test_inputs_outgrow_the_cache():
    cache = 50 << 20
    assert timing.input_sets(10 << 20, cache) * (10 << 20) >= 3 * cache
    assert timing.input_sets(1 << 30, cache) == 1 and timing.input_sets(1, cache) == timing.MOST_SETS
    for sets in (1, 5, 24):
        for floor in (1e-7, 1e-5, 1e-2):
            calls = timing.n_calls(sets, floor)
            assert calls % sets == 0 and sets <= calls <= max(sets, timing.MOST_CALLS)


# ---- wrong is not timed ----


def linear_problem():
    return problems.linear("tiny", 8, 32, 16, 8, problems.Maker(CPU, torch.float32), "quick_gelu", True)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y + 0.01,
        lambda y: y.roll(1, 0),
        lambda y: torch.where(torch.arange(len(y))[:, None] == 5, torch.nan, y),
        lambda y: y[:-1],
    ],
    ids=["shifted", "rolled", "nan", "short"],
)
def test_a_wrong_operator_is_reported_and_not_timed(change, tmp_path, capsys):
    calls = []

    def prepare(case):
        def call():
            calls.append(1)
            return change(case.peer()[0])

        return call

    made = new_run(tmp_path, stage="operators")
    people = [Contestant(OURS, prepare), Contestant(EAGER, operator_contestants._eager)]
    rows = operators.measure(made, linear_problem(), people, made.budget)
    assert rows[OURS]["status"] == "WRONG" and rows[OURS]["note"] and "median_s" not in rows[OURS]
    assert len(calls) == 1  # the check
    assert rows[EAGER]["status"] == "ok" and "median_s" in rows[EAGER]
    assert len(made.evidence.failures) == 1
    written = {row["contestant"]: row for row in rows_of(tmp_path)}
    assert written[OURS]["median_s"] == "" and written[EAGER]["median_s"] != ""
    report.print_report(made.evidence)
    assert "1 correctness failures" in capsys.readouterr().out


def test_a_wrong_sample_far_inside_a_large_result_is_seen():
    case = problems.layer_norm("", 4000, 16, 1, problems.Maker(CPU, torch.float32)).make()
    right = case.peer()[0]
    chosen = problems.sample(case).rows
    missed = next(i for i in range(4000) if i not in chosen)
    wrong = right.clone()
    wrong[missed, 3] += 0.5
    problems.check(right, case, right)
    problems.check(wrong, case)  # the samples alone do not see it
    with pytest.raises(AssertionError, match="a row is"):
        problems.check(wrong, case, right)


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_samples_are_the_rows_they_stand_for(operator):
    problem = next(p for p in operators.plan(CPU, dry=True) if p.operator == operator)
    case = problem.make()
    few = problems.sample(case)
    torch.testing.assert_close(problems.flat(case.exact()[0])[few.rows], problems.flat(few.case.exact()[0]))


def test_a_condemned_launch_is_not_timed_and_everybody_else_is(tmp_path):
    def prepare(case):
        raise launch_ids.Condemned("_linear_fwd_kernel: row 3 is wrong")

    made = new_run(tmp_path, stage="operators")
    people = [Contestant(OURS, prepare), *operator_contestants.of("linear")[1:]]
    rows = operators.measure(made, linear_problem(), people, made.budget)
    assert rows[OURS] == {"status": "WRONG", "note": "not timed: _linear_fwd_kernel: row 3 is wrong"}
    assert rows[EAGER]["status"] == "ok" and rows["product alone"]["status"] == "part"
    assert not made.evidence.failures  # the check that condemned it has said so


def test_what_an_operator_launches_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_ids, "launches_of", lambda call, device: [launch_ids.Launch("abc", "linear w4")])
    made = new_run(tmp_path, stage="operators")
    people = [Contestant(OURS, lambda case: lambda: case.peer()[0] + 1), Contestant(EAGER, operator_contestants._eager)]
    operators.measure(made, linear_problem(), people, made.budget)
    assert [*made.evidence.state.wrong] == ["abc"]


def test_checks_share_their_work_and_leave_out_what_is_known(monkeypatch):
    def check(name, wrong="", launches=(), dtype=torch.float16):
        def judge(result):
            if wrong:
                raise AssertionError(wrong)

        return correctness.Check(name, "linear", dtype, lambda: correctness.Work(lambda: launches, judge))

    made_of = lambda call, device: [launch_ids.Launch(each, each) for each in call()]  # noqa: E731
    monkeypatch.setattr(launch_ids, "launches_of", made_of)
    found = [check("a", launches="x"), check("b", "row 3 is wrong", "xy"), check("c", launches="y"), check("d")]
    made = new_run(stage="correctness")
    correctness.run_checks(made, iter(found), made.budget)
    assert made.evidence.notes == ["correctness: 4 checks run, 1 wrong"]
    assert made.evidence.failures == ["row 3 is wrong"] and made.evidence.state.wrong == {"y": "row 3 is wrong"}
    assert [*made.evidence.state.proved.values()] == ["a", "c"]  # of d it is not known what it depends on
    again = new_run(stage="correctness")
    again.state.proved = made.evidence.state.proved
    correctness.run_checks(again, iter(found), again.budget)
    assert again.evidence.notes == ["correctness: 2 checks run, 1 wrong, 2 found right before"]
    # each of three processes has its own share, and together they run all
    shares = []
    for part in range(3):
        made = new_run(stage="gate")
        made.state.part, made.state.parts = part, 3
        shares.append([each.name for each in correctness._share(made, iter(found), made.budget, once=False)])
    assert shares == [["a", "d"], ["b"], ["c"]]
    # once: b launches y as well, and then c has nothing new
    made = new_run(stage="gate")
    assert [each.name for each in correctness._share(made, iter(found), made.budget, once=True)] == ["a", "b", "d"]
    # who cannot see what a check launches runs it, and nobody's share moves
    taken = []
    for part in range(2):
        made = new_run(stage="gate")
        made.state.part, made.state.parts = part, 2

        def prepare(part=part):
            if part:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return correctness.Work(lambda: "x", lambda result: None)

        unseen = found[0]._replace(name="unseen", prepare=prepare)
        taken += [
            each.name for each in correctness._share(made, iter([found[0], unseen, *found]), made.budget, once=True)
        ]
    assert set(taken) >= {"a", "b", "d"}


def test_memory_that_others_have_is_no_fault_of_a_launch(monkeypatch):
    def prepare():
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = new_run(stage="gate")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    correctness.run_checks(made, iter([correctness.Check("a", "linear", torch.float16, prepare)]), made.budget)
    assert made.evidence.notes[0] == "gate: not checked: a: OutOfMemoryError: CUDA out of memory"
    assert not made.evidence.failures and not made.evidence.state.wrong and not made.evidence.state.proved


def test_nothing_published_names_a_path(tmp_path):
    made = new_run(tmp_path, stage="towers")
    made.add({"operator": "encode_image", "contestant": "a", "status": "missing", "note": "in /home/alice/site/x.py"})
    made.note("no kit in /home/alice/kit")
    made.fail("cmake: /home/alice/csrc/a.cpp:3: error")
    made.evidence.ended("towers", "died: exit status 1; last: /home/alice/x", 1.0, 2.0)
    for path in tmp_path.iterdir():
        assert "alice" not in path.read_text() and "<path>" in path.read_text()


def test_checks_end_in_time(monkeypatch):
    clock = Clock()
    made = new_run(stage="correctness", seconds=10, clock=clock)

    def slow():
        clock.now += 6
        return correctness.Work(lambda: None, lambda result: None)

    found = [correctness.Check(name, "linear", torch.float16, slow) for name in "abc"]
    correctness.run_checks(made, iter(found), made.budget)
    assert made.evidence.notes == ["correctness: 2 checks run, 0 wrong, cut off before c"]


# ---- what is checked and tuned ----


def test_every_configuration_of_tuning_is_checked():
    for dtype in (torch.bfloat16, torch.float32):
        known = problems.linear_configurations(dtype, 90)
        for rows in (1, 20, 50, 77, 300, 1600, 12800, 65792):
            for n_cols, n_terms, *_ in problems.products(768):
                for described in (True, False):
                    assert tuning.linear(rows, n_cols, n_terms, dtype, 90, described=described) in known
    assert any(config.fast_tanh for config in problems.linear_configurations(torch.bfloat16, 90))
    names = [check.name for check in correctness.checks(CPU)]
    assert len(set(names)) > 500
    for word in ("persistent=True", "split_k=8", "fast_tanh=True", "causal", "uint8", "P=14", "tf32", "CUDA graphs"):
        assert any(word in name for name in names), word


def test_candidates_fit_and_lines_can_be_pasted():
    for architecture in tuning.ARCHITECTURES:
        for rows in (1, 50, 12800):
            found = tune.candidates(rows, torch.bfloat16, architecture)
            assert found and all(c.shared_memory(2) <= tuning.SHARED_MEMORY[architecture] for c in found)
    config = tune.candidates(12800, torch.bfloat16, 90)[0]
    linear, cublas = tune.paste(90, 12800, (3072, 768, "quick_gelu", False), config, 1e-4, 2e-4)
    space = {"torch": torch, "LinearConfig": tuning.LinearConfig}
    assert eval(f"{{\n{linear}\n}}", space) == {(90, torch.bfloat16, 16384, 3072, 768): config}
    key = ("linear", 90, torch.bfloat16, 16384, 3072, 768, "quick_gelu", False)
    assert eval(f"{{\n{cublas}\n}}", space) == {key: False}


def test_tuning_is_changed_inside_only():
    before = tuning.layer_norm(768, torch.float16)
    with tune.changed(("layer_norm", "no_such_function"), {"warps": 16, "stages": 3}):
        assert tuning.layer_norm(768, torch.float16).warps == 16
    assert tuning.layer_norm(768, torch.float16) == before


# ---- tables ----


def tower_row(contestant, median, **more):
    row = {"stage": "towers", "operator": "encode_image", "model": "ViT-B/32", "batch": 256, "dtype": "bfloat16"}
    return {**row, "contestant": contestant, "status": "ok", "median_s": median, **more}


def test_the_table_compares_with_the_best_that_is_right():
    rows = [
        tower_row(OURS, 0.002, of_floor=0.5),
        tower_row(OPENAI, 0.006),
        tower_row("broken", 0.0001, status="WRONG"),
        tower_row("product alone", 0.0001, status="part"),
        tower_row("transformers", 0.004),
        tower_row("clipfast, torch backend", 0.001),
    ]
    (line,) = report.table(report._groups(rows, towers=True), 1e3)
    assert line == ("encode_image ViT-B/32 b256 bfloat16", "transformers", "2", "4", "2.00", "50%")


def test_only_those_are_compared_who_took_turns():
    """A group that is timed again, beside compilers, is another contest: in a stage of its own or in the same."""
    compiled = "openai-clip torch.compile"
    for stage in ("towers", "compiled-image"):
        first = [tower_row(OURS, 0.002), tower_row(OPENAI, 0.004)]
        again = [tower_row(name, t, stage=stage) for name, t in ((OURS, 0.010), (OPENAI, 0.020), (compiled, 0.015))]
        table = report.table(report._groups([*first, *again], towers=True), 1e3)
        assert [line[1:5] for line in table] == [(OPENAI, "2", "4", "2.00"), (compiled, "10", "15", "1.50")]
        assert table[1][0] == f"{table[0][0]} beside compilers"
        assert [report.aim_line(aim, [*first, *again], None)[2] for aim in report.AIMS[:2]] == ["2.00x", "1.50x"]


def test_aims_are_measured_or_said_not_to_be():
    aim = report.AIMS[0]
    rows = [tower_row(OURS, 0.002), tower_row("openai-clip torch.compile", 0.003)]
    assert report.aim_line(aim, rows, None)[2:] == ("-", "not measured")
    assert report.aim_line(aim, [*rows, tower_row(OPENAI, 0.006)], None)[2:] == ("3.00x", "reached")
    assert report.aim_line(aim, [*rows, tower_row(OPENAI, 0.004)], None)[2:] == ("2.00x", "MISSED")
    assert report.aim_line(report.AIMS[1], rows, None)[2:] == ("1.50x", "reached")
    assert report.aim_line(report.AIMS[-1], rows, 3e12)[2:] == ("-", "not measured")
    attention = tower_row(OURS, 1e-4, operator="attention", shape="256x8 heads L=77 causal", gb_per_s=2400.0)
    assert report.aim_line(report.AIMS[-1], [attention], 3e12)[2:] == ("80%", "MISSED")


def test_rows_are_written_as_they_come_and_nothing_is_overwritten(tmp_path):
    made = new_run(tmp_path, stage="ceilings")
    made.add({"operator": "ceiling copy", "status": "ok", "gb_per_s": 1.5})
    (row,) = rows_of(tmp_path)  # not closed, and already there
    assert row["gb_per_s"] == "1.5" and row["stage"] == "ceilings" and set(row) == set(run.COLUMNS)
    first = next(tmp_path.glob("*.csv"))
    assert environment.free_name(tmp_path, first.stem).name == f"{first.stem}-2.csv"
    assert environment.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
