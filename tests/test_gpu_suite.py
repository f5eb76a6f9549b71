"""`make gpu GPU_ARGS="--only tests"`: which tests it selects, on which device they run, and what it says of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import pytest_outcomes, suite
from clipfast import tuning
from clipfast.bench.budget import Budget

from . import backends

ROOT = Path(__file__).resolve().parents[1]


class Run:
    """What a stage asks of benchmarks.gpu.run.Run."""

    def __init__(self, *, dry: bool):
        self.dry, self.notes, self.failures = dry, [], []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def file(self, kind: str) -> Path | None:
        return None


# ---- on which device ----


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU as far as the decision asks: torch.cuda.is_available and the compute capability are mocked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "_capability", lambda index: 90)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_kernels_of_a_gpu_run_there_and_all_others_on_the_cpu(pretended_gpu, monkeypatch):
    assert {name: backends.device_of(name) for name in ("cuda", "triton", "cpu", "onednn", "torch")} == {
        **dict.fromkeys(("cuda", "triton"), "cuda"),
        **dict.fromkeys(("cpu", "onednn", "torch"), "cpu"),
    }
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.device_of("triton") == "cpu", "the interpreter knows no GPU"


def test_what_a_gpu_runs_does_not_skip_there(pretended_gpu, monkeypatch):
    for operator in ("linear", "attention", "layer_norm"):
        backends.skip_unless_it_runs("triton", operator, torch.bfloat16)
    monkeypatch.setattr(tuning, "_capability", lambda index: 75)
    with pytest.raises(pytest.skip.Exception, match="needs sm_80 or later, and this GPU is sm_75"):
        backends.skip_unless_it_runs("triton", "linear", torch.bfloat16)


def test_without_a_gpu_the_tests_that_must_have_one_fail(tmp_path):
    """Not in silence under the interpreter. Run as a test of its own, with the GPU away."""
    test = "tests/kernels/test_layer_norm.py::test_empty"
    environment = os.environ | {"CLIPFAST_REQUIRE_GPU": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "CLIPFAST_REQUIRE_GPU=1" in done.stdout


# ---- which tests ----

# before conftest.py asks; no kernel runs, so that no more of a GPU is needed
PRETEND = "import sys, torch, pytest; torch.cuda.is_available = lambda: True; sys.exit(pytest.main(sys.argv[1:]))"


def collected(*start: str) -> set[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *start, "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # one -q in pyproject.toml and one here: a file and its number of tests a line; names with --collect-only alone
    return {line for line in done.stdout.splitlines() if "::" in line or ": " in line}


@pytest.fixture(scope="module")
def on_a_gpu() -> set[str]:
    """Names of the tests that are selected where PyTorch says that there is a GPU."""
    return collected("-c", PRETEND, "-o", "addopts=")


def test_the_kernels_are_selected(on_a_gpu):
    assert len(on_a_gpu) > 1200
    for start in (
        "tests/test_ops.py::test_forward[triton-float16-",
        "tests/test_ops.py::test_gradients[triton-bfloat16-",
        "tests/test_gradients.py::test_frozen_arguments[layer_norm-triton]",
        "tests/kernels/test_attention.py::test_a_later_token_changes_no_earlier_causal_row",
        "tests/kernels/test_towers.py::test_both_towers_of_a_vision_transformer",
        "tests/test_graphs.py::test_the_same_bits_with_and_without",
        "tests/test_native.py::test_tensor_core_plans_on_the_gpu",
        "tests/test_streams.py::",
    ):
        assert any(name.startswith(start) for name in on_a_gpu), start


def test_what_runs_on_a_cpu_is_not_selected(on_a_gpu):
    for word in ("[cpu-", "[onednn-", "[torch-", "-cpu]", "-onednn]", "test_compiles.py", "test_tokenizer.py"):
        assert not [name for name in on_a_gpu if word in name], word
    # a parameter of that name is no fixture, and plans are made on the host
    assert not [name for name in on_a_gpu if "test_explain_of_a_device" in name or "test_tiles" in name]


# ---- the stage ----

TOYS = """
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", range(3))
def test_right(n):
    pass


def test_wrong():
    assert 2 + 2 == 5, "arithmetic is off"


@pytest.mark.parametrize("n", range(2))
def test_elsewhere(n):
    pytest.skip("takes two")


@pytest.fixture
def broken():
    raise RuntimeError("no such luck")


def test_set_up(broken):
    pass


def test_slow():
    if SECONDS:
        Path(__file__).with_name("slow").touch()
    time.sleep(SECONDS)
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "PROCESSES", 1)

    def write(seconds: float = 0, **others: str) -> list[str]:
        (tmp_path / "test_toys.py").write_text(TOYS.replace("SECONDS", str(seconds)))
        for name, text in others.items():
            (tmp_path / f"test_{name}.py").write_text(textwrap.dedent(text))
        return [str(tmp_path)]

    return write


def test_failures_are_named_and_skips_counted(toys):
    run = Run(dry=False)
    suite.stage(run, Budget(120), toys())
    assert run.notes == ["4 passed, 2 failed, 2 skipped of 8", "2 skipped: takes two"]
    assert [text.rpartition("::")[2][:60] for text in run.failures] == [
        "test_wrong: AssertionError: arithmetic is off assert (2 + 2)",
        "test_set_up: RuntimeError: no such luck",
    ]


def test_a_lost_context_fails_one_test_alone(toys):
    """torch.cuda mocked in the test's own process, which then is no good for the others."""
    lost = """
        import pytest
        import torch

        pytestmark = pytest.mark.gpu


        def test_a_fault():
            def synchronize():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), synchronize
            synchronize()


        @pytest.mark.parametrize("n", range(3))
        def test_behind_it(n):
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
    """
    run = Run(dry=False)
    suite.stage(run, Budget(120), [name + "/test_lost.py" for name in toys(lost=lost)])
    assert run.notes == ["3 passed, 1 failed, 0 skipped of 4"]
    assert len(run.failures) == 1 and "test_a_fault: " in run.failures[0]


def test_a_module_that_cannot_be_imported_hides_no_other(toys):
    run = Run(dry=False)
    suite.stage(run, Budget(120), toys(absent="import no_such_package", bad="from clipfast import no_such_name"))
    assert any("test_absent.py was not collected: no_such_package is not installed" in note for note in run.notes)
    assert any("test_bad.py was not collected: ImportError" in text for text in run.failures)
    assert "4 passed, 2 failed, 2 skipped of 8" in run.notes


def test_a_run_that_is_cut_off_says_how_far_it_came(toys, tmp_path, monkeypatch):
    class Short(Budget):
        def left(self) -> float:
            """Over once the slow test runs."""
            while not (tmp_path / "slow").exists():
                time.sleep(0.1)
            return 0.0

    monkeypatch.setattr(suite, "NAMED", 1)
    run = Run(dry=False)
    suite.stage(run, Short(100), toys(seconds=100))
    assert run.notes[0] == "3 passed, 2 failed, 2 skipped of 8, cut off, out of time"
    assert run.notes[-1].startswith("running when it was cut off: ") and run.notes[-1].endswith("::test_slow")
    assert len(run.failures) == 2 and run.failures[1] == "1 more tests failed; the log names them"


def test_nothing_selected_is_a_failure(toys, tmp_path):
    toys()
    (tmp_path / "test_toys.py").write_text("def test_not_of_a_gpu():\n    pass\n")
    run = Run(dry=False)
    suite.stage(run, Budget(60), [str(tmp_path)])
    assert run.failures and "status 5" in run.failures[0]


def test_a_dry_run_counts(toys):
    run = Run(dry=True)
    suite.stage(run, Budget(120), toys())
    assert run.notes == ["dry run: would run 8 tests"] and not run.failures


def test_without_pytest_it_says_so(monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    run = Run(dry=False)
    suite.stage(run, Budget(5))
    assert run.failures == ["no test was run: pytest and hypothesis not here"]


def test_a_half_written_file_is_read(tmp_path):
    path = tmp_path / "outcomes"
    assert suite.read(path) == suite.Outcomes(0, {}, {})
    writer = pytest_outcomes._Writer(path)
    writer.pytest_runtest_logstart("a::b")
    assert suite.read(path).having("running") == {"a::b": ""}
