"""openai/CLIP's `clip.clip`, for programs that import from there, the names they reach past the underscore included."""

from clipfast.checkpoints import MODELS as _MODELS
from clipfast.checkpoints import available_models, load
from clipfast.checkpoints import download as _download
from clipfast.preprocess import Preprocess as _transform
from clipfast.tokenizer import SimpleTokenizer as _Tokenizer
from clipfast.tokenizer import tokenize

__all__ = ["_MODELS", "_Tokenizer", "_download", "_transform", "available_models", "load", "tokenize"]
