"""One is one, and everything else is many."""

from __future__ import annotations

from clipfast.words import counted


def test_counted():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == ["0 images", "1 image", "2 images", "1,000 images"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
