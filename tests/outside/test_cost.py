"""What it costs to look whether anybody changed the model, counted in calls: a count is the same on every machine."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import clipfast

from ..clips import VIT, make_images, make_texts, randomise

# The functions that only look; whoever renames one renames it here.
CHECKS = ("_visual_as_made", "_short_way", "short_way")
# The checks of an encode of ViT-B/32 may take 0.2 ms. With a call at up to 0.3 us, and a comparison inside `map` at up
# to 0.1 us, so many are two thirds of that.
MOST_CALLS, MOST_COMPARISONS = 120, 1000
# As deep as ViT-B/32, since the checks go by blocks; narrow, since no check looks at a width.
DEEP = (*VIT[:2], 12, *VIT[3:9], 12)
PACKAGE = os.path.dirname(clipfast.__file__)


def _calls_in_checks(function) -> tuple[int, set[str]]:
    """How many calls, of Python's functions and of C's, are made in CHECKS, themselves included; and which ran."""
    depth, calls, seen = 0, 0, set()

    def profile(frame, event, _):
        nonlocal depth, calls
        code = frame.f_code
        check = code.co_name in CHECKS and code.co_filename.startswith(PACKAGE)
        if event == "call" and check:
            depth += 1
            seen.add(code.co_name)
        calls += depth > 0 and event in ("call", "c_call")
        if event == "return" and check:
            depth -= 1

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls, seen


@pytest.mark.parametrize("tower", ["image", "text"])
def test_looking_for_changes_takes_few_calls(tower):
    model = randomise(clipfast.CLIP(*DEEP))
    encode, x = {
        "image": (model.encode_image, make_images(DEEP, 2)),
        "text": (model.encode_text, make_texts(DEEP, 2)),
    }[tower]
    with torch.no_grad():
        encode(x)  # what is made once is no cost of a call
        calls, seen = _calls_in_checks(lambda: encode(x))
    assert seen >= {"_short_way", "short_way"}
    assert calls <= MOST_CALLS
    records = [vars(module).get("_record") for module in model.modules()]
    assert sum(len(record.values) for record in records if record is not None) <= 2 * MOST_COMPARISONS, "both towers"
