"""A process that was forked after an encode encodes too: the threads of its parent's OpenMP are not there."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import clipfast
from clipfast.kernels import cpu_linear

from . import csrc

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
SECONDS = 60


def ends_well(work) -> bool:
    """Whether a forked process comes to the end of work(), which must hold."""
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 1)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_forked_process_encodes(backend, request):
    if backend == "cpu":
        request.getfixturevalue("cpu_library")
    model = clipfast.CLIP(64, 64, 1, 128, 16, 77, 49408, 128, 2, 1).eval()
    images, text = torch.randn(16, 3, 64, 64), clipfast.tokenize(["a dog"] * 16)

    def rows():
        with torch.no_grad(), clipfast.backend(backend):
            return torch.cat([model.encode_image(images), model.encode_text(text)])

    with csrc.threads(2):
        expected = rows()
        assert ends_well(lambda: torch.get_num_threads() == 1 and torch.allclose(rows(), expected, atol=1e-5))
        assert torch.get_num_threads() == 2


def test_our_library_stays_alone_whatever_the_process_asks_for(cpu_library):
    x, weight = torch.randn(64, 256), torch.randn(512, 256)
    with csrc.threads(2):
        # by the dispatcher, which is what notices
        with clipfast.backend("cpu"), torch.no_grad():
            expected = clipfast.ops.linear(x, weight)

        def work():
            torch.set_num_threads(2)
            return torch.equal(cpu_linear.linear(x, weight, None, None, None), expected)

        assert ends_well(work)
