"""On which device a backend's tests run, and which of the backends that a test asks for are here."""

from __future__ import annotations

import pytest
import torch

from clipfast import dispatch, tuning
from clipfast.kernels import library

# their kernels run on a GPU where there is one
ON_A_GPU = ("cuda", "triton")

needs_triton = pytest.mark.skipif(library.triton_missing() is not None, reason=str(library.triton_missing()))
# a test that has nothing to say without a GPU, or with one
on_gpu = pytest.mark.usefixtures("gpu")
on_two_gpus = pytest.mark.usefixtures("two_gpus")
interpreted = pytest.mark.usefixtures("interpreter")


def device_of(backend: str) -> str:
    """Where a backend's tests run: "cuda" for kernels that run on a GPU natively, else "cpu".

    Triton's kernels are on the CPU under its interpreter, which tests/conftest.py turns on where there is no GPU.
    """
    native = torch.cuda.is_available() and not library.interpreted()
    return "cuda" if backend in ON_A_GPU and native else "cpu"


def launches_on_a_gpu(item: pytest.Item) -> bool:
    """Whether a test launches kernels where `device_of` says: it asks for that device, and of several backends it is
    the instance of one with kernels for a GPU.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    asked = set(getattr(item, "fixturenames", ())) - set(parameters)
    return "device" in asked or ("place" in asked and parameters.get("backend") in ON_A_GPU)


def skip_unless_it_runs(backend: str, operator: str, dtype: torch.dtype) -> None:
    """Skips the calling test, with the reason, where the backend refuses the operator on its own device."""
    place = device_of(backend)
    architecture = tuning.architecture(torch.device(place)) if place == "cuda" else 0
    try:
        dispatch.decide(operator, backend, dispatch.Call(place, dtype, architecture=architecture))
    except RuntimeError as error:
        pytest.skip(str(error))
