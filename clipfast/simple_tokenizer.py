"""openai/CLIP's `clip.simple_tokenizer`, for programs that import from there."""

from clipfast.tokenizer import SimpleTokenizer

__all__ = ["SimpleTokenizer"]
