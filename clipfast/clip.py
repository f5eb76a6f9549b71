"""openai/CLIP's `clip.clip`, for programs that import from there, the names they reach past the underscore included.

They also put their own in place of these: `load` and `tokenize` look up here what openai/CLIP's look up there.
"""

from typing import Any

from clipfast.checkpoints import MODELS as _MODELS
from clipfast.checkpoints import available_models, load
from clipfast.checkpoints import download as _download
from clipfast.model import build_model
from clipfast.preprocess import Preprocess as _transform
from clipfast.tokenizer import SimpleTokenizer as _Tokenizer
from clipfast.tokenizer import default_tokenizer, tokenize

__all__ = ["_MODELS", "_Tokenizer", "_download", "_transform", "available_models", "build_model", "load", "tokenize"]


def __getattr__(name: str) -> Any:
    if name == "_tokenizer":  # made when it is first asked for: it takes longer than all the rest of the import
        return default_tokenizer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
