"""One folder with what a bare GPU machine lacks, made where there is a network and used where there is none.

    python3 -m benchmarks.gpu.kit [--out .gpu-kit] [--python python3.12]        (make gpu-kit)

It holds wheels of the peers, both libraries of csrc/ and Triton's cache of the headline's launches; what cannot be made
here is left out, and the table of contents says why. Exit status 1 if it is larger than LIMIT. `make gpu` calls `use`.
Needs no torch: benchmarks/gpu/kit_parts.py makes the parts, benchmarks/gpu/cache.py says what Triton's keys consist of.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import cache
from benchmarks.gpu.plans import ROOT

MANIFEST = "manifest.json"
LIMIT = 55 << 20
LIBRARIES = ("libclipfast.so", "libclipfast_cpu.so")
# they enter Triton's keys, beside those that it lists itself
KEYED = ("TRITON_PTXAS_PATH", "TRITON_LIBDEVICE_PATH", "TRITON_DEBUG", "PTXAS_OPTIONS", "TRITON_OVERRIDE_ARCH")


class Used(NamedTuple):
    environment: dict[str, str]  # to add to that of the processes that follow
    lines: list[str]  # which parts are used, and why others are not
    sites: list[str]  # folders of packages, for sys.path of this process
    built: list[str]  # libraries that are in place, from this checkout's csrc/


# ---------------------------------------------------------------------------------------------------------------------
# What a part was made from


def digest(paths: Iterable[Path], root: Path) -> str:
    """sha256 of files by name and content."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()


def packed(folder: Path, names: Iterable[str]) -> str:
    """Of the files and folders of a part."""
    places = [folder / name for name in names]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    return digest(files, folder)


def csrc(root: Path) -> list[Path]:
    return [root / "CMakeLists.txt", *(path for path in (root / "csrc").rglob("*") if path.is_file())]


def csrc_digest(root: Path) -> str:
    return digest(csrc(root), root)


def kernel_digest(root: Path) -> str:
    return digest([root / "clipfast" / "tuning.py", *(root / "clipfast" / "kernels").glob("*.py")], root)


def build_of_triton() -> str:
    """Which build of its version is installed: the hash of its compiler, as its own list of files has it."""
    for file in metadata.files("triton") or ():
        if file.name == "libtriton.so" and file.hash is not None:
            return file.hash.value
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Use


def use(folder: Path, site: Path, *, root: Path = ROOT) -> Used:
    """Puts a kit to use, before torch or Triton are imported; a part that cannot be used costs a line, never the run.

    folder: the kit, which need not be there.   site: where wheels are installed, and beside it Triton's cache.
    root:   the checkout.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        parts, left_out = manifest["parts"], manifest["left_out"]
    except FileNotFoundError:
        return Used({}, [f"no kit in {folder}: only what is installed here is used"], [], [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Used({}, [f"{folder} is not a kit: {error!r}"], [], [])
    used = Used({}, [], [], [])
    for name in ("wheels", *LIBRARIES, "triton"):
        try:
            if name not in parts:
                text = f"not in the kit ({left_out.get(name, 'not made')})"
            elif parts[name]["packed"] != packed(folder, parts[name]["files"]):
                text = "not used: damaged, its files are not those that were packed"
            elif name == "wheels":
                text = _use_wheels(parts[name], folder, site.absolute(), used)
            elif name == "triton":
                text = _use_triton(parts[name], folder, site.absolute(), used.environment, root)
            else:
                text = _use_library(parts[name], folder / name, root)
                used.built.extend([] if text.startswith("not used") else [name])
        except Exception as error:  # a kit that is damaged or of another form: the run does without
            text = f"not used: {type(error).__name__}: {error}"
        used.lines.append(f"kit: {name}: {text}")
    return used


def _use_wheels(part: Mapping[str, Any], folder: Path, site: Path, used: Used) -> str:
    elsewhere = [path for path in sys.path if Path(path).absolute() != site]

    def importable(name: str) -> bool:
        spec = PathFinder.find_spec(name, elsewhere)
        # any folder of that name would do for a namespace
        return spec is not None and spec.origin is not None

    ways: dict[str, list[Path]] = {"importable without": [], "there already": [], "installed": []}
    for file in part["files"]:
        packages, version = contents(folder / file)
        if all(map(importable, packages)):
            ways["importable without"].append(folder / file)
        elif (site / version).exists():
            ways["there already"].append(folder / file)
        else:
            ways["installed"].append(folder / file)
    if ways["installed"]:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        command += ["--no-index", "--no-deps", "--upgrade", "--target", str(site), *map(str, ways["installed"])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"pip: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    if ways["installed"] or ways["there already"]:
        used.sites.append(str(site))
        used.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    titles = {way: ", ".join(" ".join(wheel.name.split("-")[:2]) for wheel in wheels) for way, wheels in ways.items()}
    return "; ".join(f"{way}: {names}" for way, names in titles.items() if names)


def contents(wheel: Path) -> tuple[set[str], str]:
    """The names that a wheel lets one import, and the folder that pip leaves of its version."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.partition("/")[0] for name in names if name.count("/") == 1 and name.endswith("/__init__.py")}
    modules = {name.removesuffix(".py") for name in names if "/" not in name and name.endswith(".py")}
    tops = dict.fromkeys(name.partition("/")[0] for name in names)
    return packages | modules, next(name for name in tops if name.endswith(".dist-info"))


def _use_library(part: Mapping[str, Any], made: Path, root: Path) -> str:
    if part["sources"] != csrc_digest(root):
        return "not used: it was made from another csrc/ than this checkout's"
    place = root / "clipfast" / "kernels" / made.name
    if place.exists() and not _unloadable(place):
        if place.read_bytes() == made.read_bytes():
            return "there already"
        if place.stat().st_mtime >= max(path.stat().st_mtime for path in csrc(root)):
            return "not needed: there is one, newer than its sources"
    if why := _unloadable(made):
        return f"not used: it does not load here: {why}"
    text = "in place of the one that was there" if place.exists() else "copied"
    fresh = place.with_suffix(".new")
    shutil.copyfile(made, fresh)
    fresh.replace(place)
    return text


def _unloadable(path: Path) -> str | None:
    try:
        ctypes.CDLL(str(path.absolute()))
    except OSError as error:
        # OpenMP's symbols are in the library that torch brings
        return None if "undefined symbol" in str(error) else str(error)
    return None


def _use_triton(part: Mapping[str, Any], folder: Path, site: Path, environment: dict[str, str], root: Path) -> str:
    try:
        installed = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not used: Triton is not installed"
    python = "{}.{}".format(*sys.version_info)
    for what, here, there in (
        ("Triton", installed, part["triton"]),
        ("Python", python, part["python"]),
        ("a build of Triton whose libtriton.so is", build_of_triton()[:8], part["libtriton"][:8]),
    ):
        if here != there:
            return f"not used: it is for {what} {there}, and here is {here or 'an unknown one'}"
    ours = site.parent / "triton"
    given = os.environ.get("TRITON_CACHE_DIR")
    try:
        place = Path(given or ours).absolute()
        cache.place(folder / "triton", place)
    except OSError:
        if not given:
            raise
        place = ours
        cache.place(folder / "triton", place)
    environment["TRITON_CACHE_DIR"] = str(place)
    text = f"{part['launches']} launches for sm_{part['architecture']}"
    if part["sources"] != kernel_digest(root):
        text += "; made from other kernels than this checkout's: what changed will be compiled"
    if changed := [name for name in KEYED if os.environ.get(name)]:
        text += f"; {', '.join(changed)} changes Triton's keys: expect no hits"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Make


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def table(manifest: Mapping[str, Any], total: int) -> list[str]:
    """The contents in lines."""
    lines = [
        f"  {name:<18} {part['bytes'] / 2**20:6.2f} MiB  {part['purpose']}" for name, part in manifest["parts"].items()
    ]
    lines.append(f"  {'in all':<18} {total / 2**20:6.2f} MiB of at most {LIMIT >> 20}")
    return lines + [f"  left out: {name}: {why}" for name, why in manifest["left_out"].items()]


def make(out: Path, python: str | None, *, root: Path = ROOT) -> int:
    """Makes a kit in place of what is in `out`, and says what is in it; returns the exit status."""
    from benchmarks.gpu import kit_parts

    fresh = out.with_name(f"{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    manifest: dict[str, Any] = {"parts": {}, "left_out": {}}
    for name, maker in kit_parts.makers(root, python).items():
        print(f"{name}: making", flush=True)
        try:
            made = maker(fresh, manifest["left_out"])
        except kit_parts.LeftOut as why:
            manifest["left_out"][name] = str(why)
            continue
        of_files = {"bytes": sum(size(fresh / file) for file in made["files"]), "packed": packed(fresh, made["files"])}
        manifest["parts"][name] = {**made, **of_files}
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    total = size(fresh)
    print(f"{out}:", *table(manifest, total), sep="\n")
    if total > LIMIT:
        print(f"too large to be carried; it is in {fresh}, and {out} is as it was", file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu.kit", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".gpu-kit"), help="folder of the kit (default: %(default)s)")
    parser.add_argument("--python", help="a Python 3.12 for Triton's cache (default: python3.12, if it is one)")
    options = parser.parse_args(argv)
    return make(options.out, options.python)


if __name__ == "__main__":
    raise SystemExit(main())
