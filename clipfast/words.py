"""Words of messages."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, one: str, more: str | None = None) -> str:
    """A number and its noun: "1 image", "2 images", "1,000 images".   more: the plural where an s does not make it."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"
