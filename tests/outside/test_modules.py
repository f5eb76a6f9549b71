"""Edits of a model by programs around openai/CLIP, beyond those of tests/test_changed_modules.py."""

from __future__ import annotations

import pytest

from ..clips import VIT, make_trio
from .habits import BOTH, assert_habit


def _blocks(m):
    return [*m.transformer.resblocks, *(m.visual.transformer.resblocks if hasattr(m.visual, "ln_pre") else ())]


def _each(change):
    """An edit that makes the same change to every block of both towers."""

    def edit(m, library):
        for block in _blocks(m):
            change(block, library)

    return edit


def _more_heads_alone(block, _):
    block.attn.num_heads = 4  # head_dim stays as it was: PyTorch's attention does not read it


def _no_bias(*names):
    def change(block, _):
        for name in names:
            getattr(block, name).bias = None

    return change


def _no_bias_at_the_ends(m, _):
    m.ln_final.bias = m.visual.ln_pre.bias = m.visual.ln_post.bias = None


# name: (edit, model, whose numbers change)
EDITS = {
    "num_heads without head_dim": (_each(_more_heads_alone), VIT, BOTH),
    "ln_1 without bias": (_each(_no_bias("ln_1")), VIT, BOTH),
    "ln_2 without bias": (_each(_no_bias("ln_2")), VIT, BOTH),
    "ln_final, ln_pre and ln_post without bias": (_no_bias_at_the_ends, VIT, BOTH),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model(name):
    edit, config, changes = EDITS[name]
    assert_habit(make_trio(config, edit), config, changes)
