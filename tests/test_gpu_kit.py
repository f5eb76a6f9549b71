"""The kit of `make gpu`: made-up ones are put to use, real launches find their way through a carried cache."""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.gpu import cache, kit, kit_parts
from clipfast.kernels import library

ROOT = kit.ROOT
needs_triton = pytest.mark.skipif(library.triton_missing() is not None, reason=f"{library.triton_missing()}")


@pytest.fixture
def checkout(tmp_path):
    """Sources as a digest sees them."""
    root = tmp_path / "checkout"
    for file in ("CMakeLists.txt", "csrc/a.cpp", "csrc/deep/b.h", "clipfast/tuning.py", "clipfast/kernels/linear.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(f"of {file}\n")
    return root


@pytest.fixture
def use(tmp_path, checkout, monkeypatch):
    """Writes a kit's manifest and puts the kit to use: (environment, part -> what became of it)."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    folder = tmp_path / "kit"
    folder.mkdir()

    def run(left_out=(), **parts):
        named = {}
        for name, part in ((name.replace("_so", ".so"), part) for name, part in parts.items()):
            files = part.get("files", [name])
            named[name] = {"files": files, "packed": kit.packed(folder, files), **part}
        (folder / kit.MANIFEST).write_text(json.dumps({"parts": named, "left_out": dict(left_out)}))
        used = kit.use(folder, tmp_path / "build" / "site", root=checkout)
        return used.environment, {line.split(": ")[1]: line.split(": ", 2)[2] for line in used.lines}

    run.folder = folder
    return run


def python(script: str, folder: Path, root: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """A process in which Triton compiles, though it is interpreted in this one."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **variables}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


# ---- putting one to use ----


def test_without_a_kit_nothing_is_used(tmp_path):
    environment, (line,) = kit.use(tmp_path / "none", tmp_path / "site")[:2]
    assert environment == {} and "no kit in" in line and not (tmp_path / "site").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"parts": {}}'])
def test_a_folder_that_is_no_kit_is_named(tmp_path, text):
    (tmp_path / kit.MANIFEST).write_text(text)
    environment, (line,) = kit.use(tmp_path, tmp_path / "site")[:2]
    assert environment == {} and f"{tmp_path} is not a kit" in line


def test_a_part_that_was_left_out_says_why(use):
    environment, lines = use({"triton": "no Python 3.12"})
    assert environment == {} and lines["triton"] == "not in the kit (no Python 3.12)"
    assert [*lines] == ["wheels", *kit.LIBRARIES, "triton"]


def wheel(folder: Path, name: str, *packages: str, version: str = "1.0") -> str:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for package in packages:
            archive.writestr(f"{package}/__init__.py", f"version = {version!r}\n")
        # a vendored package is not what the wheel lets one import
        archive.writestr(f"{packages[0]}/vendored/inner-2.dist-info/METADATA", "")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path.name


def test_wheels_are_installed_where_their_packages_are_missing(use, tmp_path, monkeypatch):
    files = [
        wheel(use.folder, "absent", "absent_here"),
        wheel(use.folder, "present", "pytest"),
        # as a newer setuptools lacks pkg_resources
        wheel(use.folder, "half", "pytest", "also_absent_here"),
    ]
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment, lines = use(wheels={"files": files})
    site = tmp_path / "build" / "site"
    assert lines["wheels"] == "importable without: present 1.0; installed: absent 1.0, half 1.0"
    assert environment == {"PYTHONPATH": f"{site}{os.pathsep}/elsewhere"}
    assert {path.name for path in site.iterdir() if "." not in path.name} == {
        "absent_here",
        "also_absent_here",
        "pytest",
    }
    # again, in a process that has them on its path: they count as the kit's
    monkeypatch.syspath_prepend(site)
    environment, lines = use(wheels={"files": files})
    assert lines["wheels"] == "importable without: present 1.0; there already: absent 1.0, half 1.0"
    assert environment["PYTHONPATH"].startswith(str(site))
    environment, lines = use(wheels={"files": [wheel(use.folder, "absent", "absent_here", version="2.0")]})
    assert lines["wheels"] == "installed: absent 2.0"
    assert "2.0" in (site / "absent_here" / "__init__.py").read_text()


def test_wheels_for_packages_that_are_here_leave_the_path_alone(use):
    environment, lines = use(wheels={"files": [wheel(use.folder, "present", "pytest")]})
    assert environment == {} and lines["wheels"] == "importable without: present 1.0"


def test_a_wheel_that_is_damaged_costs_a_line(use):
    (use.folder / "bad-1.whl").write_text("no archive")
    environment, lines = use(wheels={"files": ["bad-1.whl"]})
    assert environment == {} and lines["wheels"].startswith("not used: BadZipFile")


def test_a_library_of_these_sources_is_copied(use, checkout):
    name, place = "libclipfast.so", checkout / "clipfast" / "kernels" / "libclipfast.so"
    shutil.copyfile(_ctypes.__file__, use.folder / name)
    part = {"sources": kit.csrc_digest(checkout)}
    assert use(libclipfast_so=part)[1][name] == "copied"
    assert place.read_bytes() == Path(_ctypes.__file__).read_bytes()
    assert use(libclipfast_so=part)[1][name] == "there already"
    assert kit.use(use.folder, checkout / "site", root=checkout).built == [name]
    # another one, which loads too: what was built after its sources stays
    place.write_bytes(place.read_bytes() + b"\0")
    assert use(libclipfast_so=part)[1][name].startswith("not needed")
    os.utime(place, (1, 1))
    assert use(libclipfast_so=part)[1][name] == "in place of the one that was there"
    # one that does not load, however new it is; under another name, since a process loads each path once
    shutil.copyfile(_ctypes.__file__, use.folder / "libclipfast_cpu.so")
    (place.parent / "libclipfast_cpu.so").write_text("no library")
    assert use(libclipfast_cpu_so=part)[1]["libclipfast_cpu.so"] == "in place of the one that was there"
    assert (place.parent / "libclipfast_cpu.so").read_bytes() == Path(_ctypes.__file__).read_bytes()


def test_a_library_of_other_sources_or_that_does_not_load_is_not(use, checkout):
    name, place = "libclipfast_cpu.so", checkout / "clipfast" / "kernels" / "libclipfast_cpu.so"
    (use.folder / name).write_text("no library")
    assert "does not load here" in use(libclipfast_cpu_so={"sources": kit.csrc_digest(checkout)})[1][name]
    shutil.copyfile(_ctypes.__file__, use.folder / name)
    before = kit.csrc_digest(checkout)
    (checkout / "csrc" / "deep" / "b.h").write_text("changed")
    assert "another csrc/" in use(libclipfast_cpu_so={"sources": before})[1][name]
    assert not kit.use(use.folder, checkout / "site", root=checkout).built
    assert not place.exists()


def test_what_is_not_as_it_was_packed_is_not_used(use, checkout):
    """Loading a library that was cut short would end the process."""
    name, content = "libclipfast.so", Path(_ctypes.__file__).read_bytes()
    (use.folder / name).write_bytes(content)
    part = {"sources": kit.csrc_digest(checkout), "packed": kit.packed(use.folder, [name])}
    (use.folder / name).write_bytes(content[: len(content) // 2])
    assert use(libclipfast_so=part)[1][name].startswith("not used: damaged")
    assert not (checkout / "clipfast" / "kernels" / name).exists()


# ---- Triton's cache ----


def entry(folder: Path, name: str, absolute: bool) -> None:
    """As Triton 3.6 leaves one."""
    (folder / name).mkdir(parents=True)
    files = [f"k.{kind}" for kind in ("source", "ttir", "ptx", "cubin", "json")]
    for file in files:
        (folder / name / file).write_text(f"{file} of {name}")
    paths = {file: str(folder / name / file) if absolute else file for file in files}
    (folder / name / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))


@needs_triton
def test_a_cache_of_this_triton_is_put_down_with_its_own_paths(use, tmp_path, checkout, monkeypatch):
    entry(tmp_path / "made", "AAA", absolute=True)
    entry(tmp_path / "made", "STALE", absolute=True)
    cache.strip(tmp_path / "made", ["AAA"], use.folder / "triton")
    files = {file.relative_to(use.folder / "triton").as_posix() for file in (use.folder / "triton").rglob("*.*")}
    assert files == {"AAA/k.cubin", "AAA/k.json", "AAA/__grp__k.json"}
    assert str(tmp_path) not in (use.folder / "triton" / "AAA" / "__grp__k.json").read_text()

    about = {"launches": 1, "architecture": 90, "sources": kit.kernel_digest(checkout)}
    about |= {"triton": metadata.version("triton"), "libtriton": kit.build_of_triton()}
    part = {**about, "python": "{}.{}".format(*sys.version_info)}
    environment, lines = use(triton=part)
    place = tmp_path / "build" / "triton"
    assert environment == {"TRITON_CACHE_DIR": str(place)} and lines["triton"] == "1 launches for sm_90"
    group = json.loads((place / "AAA" / "__grp__k.json").read_text())["child_paths"]
    assert {name: Path(path).read_text() for name, path in group.items()} == {
        "k.cubin": "k.cubin of AAA",
        "k.json": "k.json of AAA",
    }
    # into the folder that is given, and where it cannot be written, into its own
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "given"))
    assert use(triton=part)[0] == {"TRITON_CACHE_DIR": str(tmp_path / "given")}
    assert (tmp_path / "given" / "AAA" / cache.MARK).exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert use(triton=part)[0] == {"TRITON_CACHE_DIR": str(place)}
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/some/ptxas")
    (checkout / "clipfast" / "tuning.py").write_text("changed")
    assert "other kernels" in use(triton=part)[1]["triton"] and "TRITON_PTXAS_PATH" in use(triton=part)[1]["triton"]


@needs_triton
def test_a_cache_of_another_triton_or_python_is_not_used(use):
    good = {"triton": metadata.version("triton"), "python": "{}.{}".format(*sys.version_info)}
    good |= {"libtriton": kit.build_of_triton(), "launches": 1, "architecture": 90, "sources": ""}
    for name, other in (("triton", "3.0.1"), ("python", "3.99"), ("libtriton", "0123abcd")):
        environment, lines = use(triton={**good, name: other})
        assert environment == {} and other in lines["triton"] and good[name][:8] in lines["triton"], name


def test_hits_are_said_in_one_line():
    assert "does not tell" in cache.Hits().line()
    hits = cache.Hits(True, brought=56, found=1, compiled=Counter({"_a_kernel": 1, "_b_kernel": 2}))
    expected = "56 of 60 launches were in the kit's cache, 1 compiled earlier on this machine; "
    assert hits.line() == expected + "compiled: _b_kernel (2), _a_kernel (1)"


CASES = """
import json, sys
from pathlib import Path
import torch
from benchmarks.gpu import cache, precompile
from clipfast import ops
def cases(*widths):
    for width in widths:
        x, w = torch.empty(16, width, dtype=torch.float16), torch.empty(width)
        yield lambda x=x, w=w: ops.layer_norm(x, w, w, 1e-5)
"""


@needs_triton
def test_a_carried_cache_is_hit_from_another_place(tmp_path):
    """Triton's own way to a launch asks for the keys under which it was compiled elsewhere."""
    made, copy = tmp_path / "made", tmp_path / "copy"
    fill = "print(json.dumps(precompile.fill(cases(512, 768), 1)))"
    done = python(CASES + fill, tmp_path, TRITON_CACHE_DIR=str(made))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["launches"], len(set(found["entries"])), found["triton"]) == (2, 2, metadata.version("triton"))
    cache.strip(made, found["entries"], tmp_path / "carried")
    cache.place(tmp_path / "carried", tmp_path / "cache")
    shutil.rmtree(made)  # an absolute path that was kept would lead there
    for name in ("clipfast", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "results", "__pycache__"))
    ask = "print(json.dumps(precompile.ask(cases(512, 768, 1024))[0]))"
    done = python(CASES + ask, copy, copy, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "line": "2 of 3 launches were in the kit's cache; compiled: _layer_norm_fwd_kernel (1)",
        "missed": ["_layer_norm_fwd_kernel"],
    }


# ---- making one ----


@pytest.fixture
def parts(monkeypatch):
    """Makers in place of the real ones, which need a network and minutes."""

    def small(out: Path, left_out: dict[str, str]) -> kit_parts.Part:
        (out / "folder").mkdir()
        (out / "folder" / "a").write_bytes(bytes(1000))
        (out / "b").write_bytes(bytes(24))
        left_out["half"] = "no tool for it"
        return {"files": ["folder", "b"], "purpose": "small things", "sources": "abc"}

    def none(out: Path, left_out: dict[str, str]) -> kit_parts.Part:
        raise kit_parts.LeftOut("nvcc not found")

    monkeypatch.setattr(kit_parts, "makers", lambda root, python: {"small": small, "libclipfast.so": none})


def test_a_kit_says_what_is_in_it(parts, tmp_path, capsys):
    out = tmp_path / "kit"
    assert kit.main(["--out", str(out)]) == 0
    manifest = json.loads((out / kit.MANIFEST).read_text())
    small = {"files": ["folder", "b"], "bytes": 1024, "purpose": "small things", "sources": "abc"}
    assert manifest["parts"] == {"small": {**small, "packed": kit.packed(out, small["files"])}}
    assert manifest["left_out"] == {"half": "no tool for it", "libclipfast.so": "nvcc not found"}
    text = capsys.readouterr().out
    assert "small things" in text and "left out: libclipfast.so: nvcc not found" in text and "of at most 55" in text
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]


def test_a_kit_that_is_too_large_is_refused(parts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "kit"
    out.mkdir()
    (out / "before").touch()
    monkeypatch.setattr(kit, "LIMIT", 1000)
    assert kit.main(["--out", str(out)]) == 1
    assert "too large" in capsys.readouterr().err and [path.name for path in out.iterdir()] == ["before"]


def test_the_limit_is_what_can_be_carried():
    assert kit.LIMIT == 55 * 1024 * 1024


def test_without_a_python_of_the_gpu_machine_the_cache_is_left_out(tmp_path, capsys, monkeypatch):
    triton = {"triton": kit_parts.makers(ROOT, "no-such-python")["triton"]}
    monkeypatch.setattr(kit_parts, "makers", lambda root, python: triton)
    assert kit.main(["--out", str(tmp_path / "kit")]) == 0
    assert "left out: triton: no-such-python does not run" in capsys.readouterr().out
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 3.11\n")
    other.chmod(0o755)
    with pytest.raises(kit_parts.LeftOut, match=r"python is 3\.11, not 3\.12"):
        kit_parts.find_python(str(other))


@pytest.mark.parametrize(("name", "compiler"), [("libclipfast.so", "nvcc"), ("libclipfast_cpu.so", r"g\+\+")])
def test_without_a_compiler_a_library_is_left_out(name, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(kit_parts.LeftOut, match=f"cmake and {compiler} not found"):
        kit_parts.makers(ROOT, None)[name](tmp_path, {})
