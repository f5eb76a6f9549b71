"""Everything is in pyproject.toml; this file is where the build of the CUDA library will hook in."""

from setuptools import setup

setup()
