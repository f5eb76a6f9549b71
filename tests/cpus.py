"""CPUs that a test of dispatch speaks of, so that it says the same whatever CPU it runs on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest

from clipfast import dispatch


class Cpu(NamedTuple):
    """All that dispatch asks of a CPU."""

    instructions: str  # the best that libclipfast_cpu has for it
    bfloat16: bool = False  # has oneDNN bfloat16 products for it?
    amx: bool = False
    built: bool = True  # is libclipfast_cpu there?


CPUS = {
    "baseline": Cpu("baseline"),
    "avx2": Cpu("avx2"),
    "avx512": Cpu("avx512", bfloat16=True),
    "avx512_bf16": Cpu("avx512_bf16", bfloat16=True),
    "amx": Cpu("avx512_bf16", bfloat16=True, amx=True),
}


def assume(monkeypatch: pytest.MonkeyPatch, cpu: Cpu) -> None:
    """Until the test ends dispatch decides as on this CPU, with oneDNN, and has decided nothing yet.

    What then runs is what the real CPU can: a test that runs bfloat16 must not give it products that it lacks.
    """
    monkeypatch.setattr(dispatch.cpu_library, "missing", lambda: None if cpu.built else "not built")
    monkeypatch.setattr(dispatch.cpu_library, "best", lambda: cpu.instructions)
    monkeypatch.setattr(dispatch.compat, "onednn_missing", lambda: None)
    monkeypatch.setattr(dispatch, "_has_bfloat16_products", lambda: cpu.bfloat16)
    monkeypatch.setattr(dispatch, "_has_amx", lambda: cpu.amx)
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_usual_backend", functools.cache(dispatch._usual_backend.__wrapped__))
