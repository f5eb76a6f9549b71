"""Edits of a model that several tests of habits make."""

from __future__ import annotations

from torch import nn


def each_block(change):
    """An edit that makes the same change to every block of both towers."""

    def edit(m, library):
        for block in (*m.transformer.resblocks, *m.visual.transformer.resblocks):
            change(block, library)

    return edit


def last_blocks(change):
    """The same change to the last block of each tower."""

    def edit(m, library):
        for tower in (m, m.visual):
            change(tower.transformer.resblocks[-1], library)

    return edit


def set_to(path, value):
    """An edit that sets an attribute of the model to value(what was there)."""
    parent, _, last = path.rpartition(".")

    def edit(m, _):
        owner = m.get_submodule(parent)
        setattr(owner, last, value(getattr(owner, last)))

    return edit


class Wrapped(nn.Module):
    """Somebody's module around one of the model's, which hides its attributes."""

    def __init__(self, inner, before=None, after=None):
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x):
        x = self.inner(x if self.before is None else self.before(x))
        return x if self.after is None else self.after(x)


def mixed(x):
    """A change that no LayerNorm takes away."""
    return x + 0.5 * x.flip(-1)


def resblocks(change):
    def edit(m, library):
        for tower in (m, m.visual):
            tower.transformer.resblocks = change(tower.transformer.resblocks)

    return edit


def each_tower(change):
    def edit(m, library):
        change(m, library)
        change(m.visual, library)

    return edit
