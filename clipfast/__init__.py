"""CLIP on fused kernels: a drop-in for openai/CLIP (`import clipfast as clip`) with the same numbers, faster."""

from clipfast import clip, model, simple_tokenizer
from clipfast.checkpoints import CheckpointError, available_models, load, save
from clipfast.dispatch import backend, explain
from clipfast.model import CLIP, build_model, convert_weights
from clipfast.preprocess import Preprocess
from clipfast.tokenizer import SimpleTokenizer, tokenize

__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "CheckpointError",
    "Preprocess",
    "SimpleTokenizer",
    "available_models",
    "backend",
    "build_model",
    "clip",
    "convert_weights",
    "explain",
    "load",
    "model",
    "save",
    "simple_tokenizer",
    "tokenize",
]
