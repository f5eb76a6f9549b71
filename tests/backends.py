"""Which of the backends that a test asks for are here."""

from __future__ import annotations

import pytest

from clipfast.kernels import library

needs_triton = pytest.mark.skipif(library.triton_missing() is not None, reason=str(library.triton_missing()))
