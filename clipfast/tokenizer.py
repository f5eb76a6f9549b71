"""CLIP's byte-pair tokenizer with the ids of openai/CLIP.

text -> clean -> split into words -> ids of each word (cached) -> int32 [n, context_length]

It is ten times as fast for ASCII captions; for others ftfy, which is called as it is, sets the pace.

The byte-pair merges run in the Rust library `tokenizers`, one word at a time and once per distinct word. Its
own batch path (splitting in Rust as well) was measured and left: on one core it gave 25 thousand captions/s,
cleaning not counted, against 140 thousand or more for a word cache; it finds the special tokens in places
where openai/CLIP does not; and its thread pool warns after a fork. (Measured 2026-11 on one x86 core with
20,000 captions of about 77 characters, tokenizers 0.23.3.)
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import re
import sys
import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["SimpleTokenizer", "bytes_to_unicode", "default_bpe", "tokenize"]

START, END = "<|startoftext|>", "<|endoftext|>"

_DATA = Path(__file__).parent / "data"
_MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# 49,408 ids = 256 bytes + 256 bytes that end a word + the merges + START and END
_N_MERGES = 49408 - 2 * 256 - 2

# About 50 MB when full. It is emptied then, or words of another language would stay uncached for ever.
_MAX_CACHED_WORDS = 1 << 18
_MAX_CACHED_LENGTH = 64

_PLAIN_ASCII = re.compile(r"[\t\n\x20-\x7e]*")
# White_Space of Unicode, the `\s` of the regex package; `\s` of re also holds U+001C to U+001F.
_WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


def default_bpe() -> str:
    """Path of the merge table shipped with clipfast (`bpe_simple_vocab_16e6.txt.gz`)."""
    return str(_DATA / "bpe_simple_vocab_16e6.txt.gz")


def bytes_to_unicode() -> dict[int, str]:
    """The byte-level alphabet: a visible character for each of the 256 bytes, in the order of their ids."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    characters = visible + [256 + i for i in range(len(hidden))]
    return {byte: chr(character) for byte, character in zip(visible + hidden, characters, strict=True)}


def _read_merges(path: str) -> list[tuple[str, str]]:
    raw = Path(path).read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if path == default_bpe() and digest != _MERGES_SHA256:
        expected = f"expected {_MERGES_SHA256}; reinstall clipfast"
        raise RuntimeError(f"{path} is damaged: its sha256 is {digest}, {expected}")
    try:
        lines = gzip.decompress(raw).decode("utf-8").rstrip("\n").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a gzip file of byte-pair merges: {error}") from error
    merges = []
    # the first line is a header
    for number, line in enumerate(lines[1 : _N_MERGES + 1], start=2):
        pair = line.split()
        if len(pair) != 2:
            raise ValueError(f"{path}, line {number}: a merge is two tokens, got {line!r}")
        merges.append((pair[0], pair[1]))
    return merges


# Words of cleaned ASCII text, where the only white space left is the blank.
_ASCII_WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")


@functools.cache
def _unicode_words(last: int) -> re.Pattern[str]:
    """The same for cleaned text with code points up to `last`; splits as openai/CLIP does with `regex`."""
    classes: dict[str, str] = {}
    name = ""
    for line in (_DATA / "unicode_classes.txt").read_text("ascii").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
            classes[name] = ""
        elif not line.startswith("#"):
            for item in line.split():
                first, _, end = item.partition("-")
                if int(first, 16) <= last:
                    classes[name] += f"\\U{first:0>8}-\\U{end or first:0>8}"
    letter, number = classes["letter"], classes["number"]
    # openai/CLIP ignores case after lower-casing, and two characters still feel it:
    # - long s, which lower() keeps, equals s;
    # - U+0345, a mark whose other cases are letters, is in none of the three classes and so is dropped.
    return re.compile(
        rf"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[{letter}]+|[{number}]"
        rf"|[^ \u0345{letter}{number}]+"
    )


def _words(text: str) -> list[str]:
    """Cleaned text split into words, in order; blanks are gone."""
    if text.isascii():
        return _ASCII_WORDS.findall(text)
    # re looks BMP characters up in a table but walks the other ranges one by one, at every end of a word
    last = 0x10FFFF if _BEYOND_BMP.search(text) else 0xFFFF
    return _unicode_words(last).findall(text)


def _clean(text: str) -> str:
    """Text as openai/CLIP cleans it: mojibake repaired, entities unescaped twice, one blank, lower case."""
    # ftfy returns such text as it is: nothing in it is a control character, an escape sequence or non-ASCII,
    # and an entity (which ftfy only knows with its semicolon) needs both "&" and ";".
    plain = text.isascii() and (text.isprintable() or _PLAIN_ASCII.fullmatch(text) is not None)
    if plain and "&" not in text:
        return " ".join(text.split()).lower()

    import html

    if not plain or ";" in text:
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return _WHITE_SPACE.sub(" ", text).strip().lower()


class _WordIds(dict[str, bytes]):
    """word -> its ids as the bytes of uint16; a missing word is encoded and kept.

    Every id is below 49,408. As bytes they are joined and padded to rows without a Python loop over tokens.
    """

    def __init__(self, model, byte_encoder: dict[int, str], special: dict[str, int]) -> None:
        super().__init__()
        self._model = model
        self._special = special
        self._to_alphabet = {byte: char for byte, char in byte_encoder.items() if chr(byte) != char}

    def __missing__(self, word: str) -> bytes:
        if word in self._special:
            ids = [self._special[word]]
        else:
            spelled = word.encode("utf-8").decode("latin-1").translate(self._to_alphabet)
            ids = [token.id for token in self._model.tokenize(spelled)]
        packed = array("H", ids).tobytes()
        if len(word) <= _MAX_CACHED_LENGTH:
            if len(self) >= _MAX_CACHED_WORDS:
                self.clear()
            self[word] = packed
        return packed


class SimpleTokenizer:
    """Text <-> ids, with the interface and the ids of openai/CLIP's class of this name.

    bpe_path:   a gzip file of merges, header line first; default: the table shipped with clipfast, whose
                sha256 is checked.
    Attributes: `encoder` {token: id}, `decoder` {id: token}, `byte_encoder` {byte: character}, `byte_decoder`
                {character: byte}, `bpe_ranks` {(left, right): rank}. A token that ends a word ends in "</w>".
    Raises:     RuntimeError if the shipped table is damaged; ValueError if another file is not a table of
                merges; FileNotFoundError.

    Instances can be pickled and shared by threads.
    """

    def __init__(self, bpe_path: str | os.PathLike[str] | None = None) -> None:
        # here, not at the top: importing clipfast stays cheap for those who only embed images
        from tokenizers.models import BPE

        self._bpe_path = default_bpe() if bpe_path is None else os.fspath(bpe_path)
        merges = _read_merges(self._bpe_path)
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        alphabet = list(self.byte_encoder.values())
        vocabulary = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), START, END]
        self.encoder = {token: i for i, token in enumerate(vocabulary)}
        self.decoder = {i: token for token, i in self.encoder.items()}
        self.bpe_ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._model = BPE(vocab=self.encoder, merges=merges, end_of_word_suffix="</w>")
        self._word_ids = _WordIds(self._model, self.byte_encoder, {t: self.encoder[t] for t in (START, END)})

    def __reduce__(self):
        return type(self), (self._bpe_path,)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; 49,408 with the shipped table."""
        return len(self.encoder)

    def bpe(self, token: str) -> str:
        """The tokens of one word, joined by blanks; `token` is spelled in the byte-level alphabet."""
        if token in (START, END):
            return token
        return " ".join(piece.value for piece in self._model.tokenize(token))

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without start and end tokens.

        A lone surrogate becomes U+FFFD, as in openai/CLIP (ftfy does it).
        Raises: TypeError if text is not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        return memoryview(self._pack(text)).cast("H").tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, without start and end tokens; raises TypeError like `tokenize`."""
        return [memoryview(self._pack(text)).cast("H").tolist() for text in _as_list(texts)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids (ints, or a 1-D tensor or array); every "</w>" becomes a blank.

        Bytes that are not UTF-8 become U+FFFD. Raises KeyError for an id outside the vocabulary.
        """
        spelled = "".join([self.decoder[int(token)] for token in tokens])
        text = bytes([self.byte_decoder[character] for character in spelled])
        return text.decode("utf-8", errors="replace").replace("</w>", " ")

    def _pack(self, text: str) -> bytes:
        """`encode` as the bytes of uint16."""
        return b"".join(map(self._word_ids.__getitem__, _words(_clean(text))))


def _as_list(texts: str | Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, (bytes, bytearray)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a str or a sequence of str, not {type(texts).__name__}")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{position}] must be a str, not {type(text).__name__}")
    return texts


@functools.lru_cache(maxsize=1)
def default_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """Texts as rows of ids: start token, text, end token, zeros.

    texts:          one text or a sequence of n.
    context_length: length of a row, at least 2; every model of openai/CLIP has 77.
    truncate:       cut a text that does not fit, with the end token in the last place, instead of raising.
    Returns:        [n, context_length] int32.
    Raises:         RuntimeError if a text does not fit; TypeError, with its position, for anything that is
                    not a str; ValueError if context_length < 2.
    """
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (start and end token), got {context_length}")
    texts = _as_list(texts)
    tokenizer = vars(sys.modules["clipfast.clip"]).get("_tokenizer") or default_tokenizer()
    if not isinstance(tokenizer, SimpleTokenizer) or type(tokenizer).encode is not _ENCODE:
        return _tokenize_by(tokenizer, texts, context_length, truncate)
    start, end = tokenizer._pack(START), tokenizer._pack(END)
    width = context_length * len(end)
    room = width - len(start) - len(end)
    rows = []
    for text in texts:
        ids = tokenizer._pack(text)
        if len(ids) > room:
            if not truncate:
                raise RuntimeError(f"Input {text} is too long for context length {context_length}")
            ids = ids[:room]
        rows.append((start + ids + end).ljust(width, b"\0"))
    table = np.frombuffer(b"".join(rows), np.uint16).reshape(len(texts), context_length)
    return torch.from_numpy(table.astype(np.int32))


# programs replace this method, or the tokenizer
_ENCODE = SimpleTokenizer.encode


def _tokenize_by(tokenizer: Any, texts: Sequence[str], context_length: int, truncate: bool) -> torch.Tensor:
    """By somebody's own tokenizer, of which openai/CLIP takes `encode` and the ids of two tokens in `encoder`."""
    start, end = tokenizer.encoder[START], tokenizer.encoder[END]
    table = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for row, text in zip(table, texts, strict=True):
        ids = [start, *tokenizer.encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise RuntimeError(f"Input {text} is too long for context length {context_length}")
            ids = [*ids[: context_length - 1], end]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return table
