"""Data, and a run that nothing interrupted, for all tests of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipfast import cli

from .pairs import write_classes, write_folder, write_model, write_shards
from .runs import N, arguments


@pytest.fixture
def one_thread():
    """The number of threads decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with the architecture, shards, and captioned images, one of them damaged."""
    folder = tmp_path_factory.mktemp("data")
    write_model(folder)
    write_shards(folder / "shards", N)
    write_classes(folder / "classes", 6)
    write_folder(folder / "pairs", N)
    (folder / "pairs" / "a" / "003.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main(arguments(data, out, "--keep", "3")) == 0
    torch.set_num_threads(before)
    return out
