"""The reduced set that tests/versions.py runs on each PyTorch, and what it makes of an answer."""

from __future__ import annotations

import subprocess

import pytest

from . import versions


@pytest.mark.parametrize("test", versions.TESTS)
def test_what_the_reduced_set_names_is_there(test):
    path, _, name = test.partition("::")
    assert (versions.ROOT / path).exists() and (not name or f"def {name}(" in (versions.ROOT / path).read_text())


def test_the_constraints_leave_pytorch_free(tmp_path):
    names = {line.partition("==")[0] for line in versions.constraints(tmp_path).read_text().splitlines()}
    assert {"numpy", "pytest", "openai-clip"} <= names and not names & {"torch", "torchvision", "triton"}


@pytest.mark.parametrize(
    ("last", "status", "passed", "failed"),
    [
        ("3 passed, 1 skipped in 2.0s", 0, 3, 0),
        ("1 failed, 2 passed, 1 error in 2.0s", 1, 2, 2),
        # a crash or a mistake in the call, of which no test tells
        ("ERROR: file or directory not found: tests/nowhere.py", 4, 0, 1),
        ("3 passed in 2.0s", 3, 3, 1),
    ],
)
def test_a_failure_is_told(last, status, passed, failed, monkeypatch, capsys):
    monkeypatch.setattr(versions, "make_environment", lambda folder, version: folder / "python")
    monkeypatch.setattr(versions, "installed", lambda python, package: "9.9")
    done = subprocess.CompletedProcess([], status, f"FAILED tests/a.py\n{last}\n", "")
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: done)
    assert versions.main(("2.6",)) == int(failed > 0)
    result = capsys.readouterr().out
    assert f"PyTorch 9.9: {passed} passed, {failed} failed" in result
    assert ("FAILED tests/a.py" in result) == (failed > 0)


def test_a_version_that_cannot_be_installed_does_not_end_the_others(monkeypatch, capsys):
    def refuse(folder, version):
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(versions, "make_environment", refuse)
    assert versions.main(("2.98", "2.99")) == 1
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["2.98", "0", "1"],
        ["2.99", "0", "1"],
    ]
