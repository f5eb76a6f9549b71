"""A reduced set of tests on each PyTorch that is promised: python -m tests.versions [version ...]

"oldest" is the first that pyproject.toml allows, "newest" what pip finds. Each gets an environment of its own in a
temporary folder, removed before the next is made: on Linux an older PyTorch is a CUDA build of 5 GB. Triton is what
that PyTorch asks for, everything else as constraints.txt says. Prints a table; the status is 1 if a test has failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
VERSIONS = (OLDEST, "2.8", "2.11", "2.13", "newest")
PACKAGES = (
    *("numpy", "pillow", "tokenizers", "ftfy", "tqdm"),
    *("pytest", "pytest-xdist", "hypothesis", "safetensors"),
    *("setuptools", "wheel", "regex", "packaging"),  # of openai-clip
)
# What depends on PyTorch: a file, or one test of a file.
TESTS = (
    # its private names, and what is done to a model from outside
    "tests/test_compat.py",
    "tests/outside",
    # both towers and their gradients, beside openai-clip's
    "tests/test_drop_in.py",
    "tests/test_model.py::test_gradients_through_the_logits",
    "tests/test_model.py::test_float64_gradients_are_exact",
    "tests/test_model.py::test_float16",
    # gradients of single operators, the loss, kept layouts
    "tests/test_gradients.py",
    "tests/test_loss.py::test_against_float64",
    "tests/test_loss.py::test_a_forced_backend_runs_the_loss",
    "tests/test_prepack.py::test_towers",
    # each kernel of Triton's, under its interpreter
    "tests/kernels/test_attention.py::test_many_short_captions_share_tiles",
    "tests/kernels/test_attention.py::test_strides",
    "tests/kernels/test_attention.py::test_pool_reads_any_stride",
    "tests/kernels/test_attention_backward.py::test_strides",
    "tests/kernels/test_clip_loss.py::test_some_of_the_rows",
    "tests/kernels/test_contrastive.py::test_empty_and_strided",
    "tests/kernels/test_layer_norm.py::test_gaps_between_rows",
    "tests/kernels/test_layer_norm.py::test_rows_and_gradients_with_gaps",
    "tests/kernels/test_linear.py::test_a_persistent_program_takes_more_than_one_tile",
    "tests/kernels/test_linear.py::test_a_split_sum_is_the_whole_sum",
    "tests/kernels/test_mlp_gradients.py::test_the_gradient_of_the_pre_activation",
    "tests/kernels/test_patch_embed.py::test_images_cut_out_of_larger_ones",
)
# onnx and onnxscript, which export and run, go with one PyTorch each
WITHOUT = ("tests/outside/test_exports.py::test_onnx",)


class Result(NamedTuple):
    torch: str
    triton: str
    passed: int
    failed: int
    skipped: int
    size: str
    install: str
    tests: str


def constraints(folder: Path) -> Path:
    """constraints.txt without the packages that follow PyTorch's version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = folder / "constraints.txt"
    path.write_text("\n".join(line for line in lines if not re.match(r"(torch|torchvision|triton)==", line)) + "\n")
    return path


def make_environment(folder: Path, version: str) -> Path:
    """Installs PyTorch and what the tests need. Returns: its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"

    def install(*arguments: str | Path) -> None:
        quiet = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--no-compile")
        subprocess.run([python, "-m", "pip", "install", *quiet, *arguments], check=True)

    # unconstrained: an older PyTorch wants an older sympy
    install("torch" if version == "newest" else f"torch=={version}.*")
    if not installed(python, "triton"):  # a CPU build asks for none
        install("-c", ROOT / "constraints.txt", "triton")
    install("-c", constraints(folder), *PACKAGES)
    # torchvision 0.21 belongs to PyTorch 2.6, and so on; --no-deps, or it would choose a PyTorch of its own
    minor = int(installed(python, "torch").split(".")[1]) + 15
    install("--no-deps", f"torchvision==0.{minor}.*")
    install("-c", constraints(folder), "--no-deps", "--no-build-isolation", "openai-clip")
    return python


def installed(python: Path, package: str) -> str:
    """The version of a package, "" where there is none."""
    code = "import sys; from importlib import metadata\n"
    code += "print(next((d.version for d in metadata.distributions(name=sys.argv[1])), ''))"
    return subprocess.run([python, "-c", code, package], check=True, capture_output=True, text=True).stdout.strip()


def run_tests(python: Path) -> tuple[str, int, float]:
    """What pytest printed, its status, and its seconds."""
    command = [python, "-m", "pytest", "-n", "auto", "--maxprocesses=4", "-p", "no:cacheprovider"]
    command += [f"--deselect={test}" for test in WITHOUT]
    # openai-clip must be there: without it half of the tests would skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CLIPFAST_REQUIRE_PEERS": "1"}
    start = time.monotonic()
    done = subprocess.run([*command, *TESTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode, time.monotonic() - start


def try_version(version: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="clipfast-") as folder:
        start = time.monotonic()
        try:
            python = make_environment(Path(folder), version)
        except subprocess.CalledProcessError:  # pip has said why
            return Result(version, "", 0, 1, 0, "", "failed", "")
        seconds = time.monotonic() - start
        size = sum(path.lstat().st_size for path in Path(folder).rglob("*"))
        output, status, took = run_tests(python)
        counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
        for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", output.strip().rpartition("\n")[2]):
            counts[kind] = int(number)
        # a crash is no test's failure, but it is one
        failed = counts["failed"] + counts["error"] or int(status != 0)
        if failed:
            print(output, flush=True)
        versions = (installed(python, "torch"), installed(python, "triton"))
    times = (f"{size / 1e9:.1f} GB", f"{seconds:.0f} s", f"{took:.0f} s")
    return Result(*versions, counts["passed"], failed, counts["skipped"], *times)


def main(versions: tuple[str, ...]) -> int:
    results = []
    for version in versions or VERSIONS:
        results.append(try_version(OLDEST if version == "oldest" else version))
        print(f"PyTorch {results[-1].torch}: {results[-1].passed} passed, {results[-1].failed} failed", flush=True)
    rows = [Result._fields, *(tuple(map(str, result)) for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
