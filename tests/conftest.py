"""Settings of every test: threads, seeds, hypothesis profiles, no network."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers or open_clip is imported: a test that asks a hub for a file fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

# A peer's convolution in tf32 would excuse ours.
torch.backends.cudnn.allow_tf32 = False

# Before Triton is imported: without a GPU its kernels run as NumPy.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class _TorchRandom:
    """Lets hypothesis seed torch before each example, so that a failing example fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# hypothesis keeps only a weak reference
_TORCH_RANDOM = _TorchRandom()
hypothesis.register_random(_TORCH_RANDOM)

# No deadline: a first call that compiles or loads is slow once.
_COMMON = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("local", **_COMMON)
hypothesis.settings.register_profile("ci", derandomize=True, database=None, print_blob=True, **_COMMON)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# Enough to run the threaded paths, few enough that results do not depend on how wide the machine is. Each of several
# workers (pytest-xdist) has a core: two pools of threads on one would wait for each other.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, torch.get_num_threads() // _WORKERS)))


def pytest_configure(config) -> None:
    # not in pyproject.toml: an older pytest runs without it
    config.addinivalue_line("markers", "gpu: launches something on a GPU where there is one; set by tests/conftest.py")


def pytest_itemcollected(item) -> None:
    from . import backends

    if backends.launches_on_a_gpu(item):
        item.add_marker("gpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Memory from torch.empty is NaN: whoever forgets to write a part of it is seen."""
    # a warning alone: cuBLAS wants a variable of the environment, of a peer too
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


# of the session, so that hypothesis may ask for it
@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton's kernels run: on the GPU, or under the interpreter on the CPU. Who asks for it is marked gpu."""
    from . import backends

    place = backends.device_of("triton")
    if place == "cpu" and os.environ.get("CLIPFAST_REQUIRE_GPU") == "1":
        pytest.fail("no GPU, or TRITON_INTERPRET is on (CLIPFAST_REQUIRE_GPU=1)", pytrace=False)
    return place


@pytest.fixture
def place(backend) -> str:
    """Where the backend runs that the test is parametrised by. Marked gpu are those with kernels for one."""
    from . import backends

    return backends.device_of(backend)


@pytest.fixture
def gpu(device) -> None:
    if device == "cpu":
        pytest.skip("no GPU")


@pytest.fixture
def two_gpus(gpu) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU; this takes two")


@pytest.fixture
def interpreter() -> None:
    from clipfast.kernels import library

    if not library.interpreted():
        pytest.skip("of Triton's interpreter, and here the kernels run natively")


@pytest.fixture(scope="session")
def cpu_library_file(tmp_path_factory) -> Path:
    """libclipfast_cpu, built here if it is not installed."""
    from clipfast.kernels import cpu_library

    from . import csrc

    return csrc.built(cpu_library.LIBRARY, tmp_path_factory.mktemp("cpu"), "g++", ["-DCLIPFAST_CUDA=OFF"])


@pytest.fixture(scope="module")
def cpu_library(cpu_library_file) -> Iterator[ctypes.CDLL]:
    from clipfast.kernels import cpu_library

    from . import csrc

    with csrc.loaded_from(cpu_library.LIBRARY, cpu_library_file) as loaded:
        yield loaded


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def form(request, cpu_library) -> str:
    """Each of the instruction sets that libclipfast_cpu is compiled for and this CPU has, or the one it is held to."""
    from clipfast.kernels import cpu_library as library

    if (os.environ.get(library.SWITCH) or request.param) != request.param:
        pytest.skip(f"{library.SWITCH} names another")
    if library.INSTRUCTIONS[request.param] > library.INSTRUCTIONS[library.best()]:
        pytest.skip("this CPU has not the instructions")
    return request.param
