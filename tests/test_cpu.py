"""What is said of a CPU that only emulates bfloat16: which those are, and who says it."""

from __future__ import annotations

import platform
import warnings

import pytest
import torch
from PIL import Image

import clipfast
from clipfast import cli, compat, cpu, doctor
from clipfast.bench import environment

from .tiny_clips import VIT, randomise

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("machine", "capability", "bf16", "amx", "onednn", "lacks"),
    [
        # Zen 3; Cascade Lake, where oneDNN says yes; Zen 5; Sapphire Rapids
        ("x86_64", "AVX2", False, False, False, "AVX-512"),
        ("x86_64", "AVX512", False, False, True, "AVX512_BF16 and AMX"),
        ("x86_64", "AVX512", True, False, True, None),
        ("AMD64", "AVX512_AMX", False, True, True, None),
        ("aarch64", "DEFAULT", False, False, False, "instructions for bfloat16"),
        ("aarch64", "SVE256", False, False, True, None),
    ],
)
def test_which_cpus_emulate_bfloat16(monkeypatch, machine, capability, bf16, amx, onednn, lacks):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name, value in (("cpu_has_avx512_bf16", bf16), ("cpu_has_amx", amx), ("onednn_has_bfloat16", onednn)):
        monkeypatch.setattr(compat, name, lambda value=value: value)
    reason = cpu.bfloat16_is_emulated.__wrapped__()
    assert (reason is None) == (lacks is None)
    if lacks:
        assert f"this CPU lacks {lacks}: float32 is faster" in reason


@pytest.fixture
def emulated(monkeypatch):
    for module in (cpu, doctor, environment):
        monkeypatch.setattr(module, "bfloat16_is_emulated", lambda: "bfloat16 is emulated")
    cpu.warn_of_emulation.cache_clear()
    yield
    cpu.warn_of_emulation.cache_clear()


def test_load_warns_once(emulated, tmp_path):
    clipfast.save(randomise(clipfast.CLIP(*VIT)), tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipfast.load(tmp_path / "m.pt", "cpu", dtype="float16")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            clipfast.load(tmp_path / "m.pt", "cpu", dtype="bfloat16")
    assert [(str(warning.message), warning.filename) for warning in told] == [("bfloat16 is emulated", __file__)]


def test_the_command_line_warns_in_one_line(emulated, tmp_path, capsys):
    clipfast.save(randomise(clipfast.CLIP(*VIT)), tmp_path / "m.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    arguments = ["--model", tmp_path / "m.pt", "--out", tmp_path / "out.npz", "--device", "cpu", "--dtype", "bfloat16"]
    assert cli.main([*map(str, ["encode", tmp_path / "black.png", *arguments])]) == 0
    assert "clipfast: warning: bfloat16 is emulated" in capsys.readouterr().err.splitlines()


def test_doctor_and_bench_say_it(emulated, capsys):
    assert "bfloat16        bfloat16 is emulated\n" in doctor.report()
    environment.warn_if_emulated(GPU, ["float32", "bfloat16"])
    environment.warn_if_emulated(CPU, ["float32"])
    assert capsys.readouterr().err == ""
    environment.warn_if_emulated(CPU, ["float32", "bfloat16"])
    assert capsys.readouterr().err == "warning: bfloat16 is emulated\n"
