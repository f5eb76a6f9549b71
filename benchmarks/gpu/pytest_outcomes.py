"""A pytest plugin: a line of JSON for each test as it begins and ends, in the file that CLIPFAST_OUTCOMES names.

A run that is cut off has then said how far it came. `benchmarks/gpu/suite.py` reads the file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = "CLIPFAST_OUTCOMES"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, which report to the one that writes
        config.pluginmanager.register(_Worker())
    elif FILE in os.environ:
        config.pluginmanager.register(_Writer(Path(os.environ[FILE])))


class _Worker:
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # once a kernel has faulted, all that follows in its process fails: pytest-xdist starts another
        if report.failed and _context_is_lost():
            os._exit(1)


def _context_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def _write(self, **facts: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(selected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._write(selected=len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(uncollected=report.nodeid, why=_last_line(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="running")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(test=report.nodeid, outcome=report.outcome, why=_why(report))


def _why(report: pytest.TestReport) -> str:
    if report.passed:
        return ""
    if report.skipped and isinstance(report.longrepr, tuple):  # (file, line, reason)
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(crash.message.split()) if crash else _last_line(report)


def _last_line(report: Any) -> str:
    lines = [line.removeprefix("E").strip() for line in report.longreprtext.splitlines()]
    return next((line for line in reversed(lines) if line), "")
