"""clipfast.tokenizer against openai/CLIP's tokenizer: the same ids for every text."""

from __future__ import annotations

import gzip
import html
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipfast import tokenizer as ours
from clipfast.tokenizer import SimpleTokenizer, bytes_to_unicode, default_bpe, tokenize
from tests.peers import openai_clip

# The release of the regex package that clipfast/data/unicode_classes.txt was read from. Another one may know
# other code points, so those that this Python does not know are compared with this release only.
REGEX_RELEASE = "2026.11.15"

_WORDS = """
    <|startoftext|> <|endoftext|> <|STARTOFTEXT|> <|EndOfText|> <|ſtartoftext|> &lt;|endoftext|&gt;
    <| |> </w> &amp;lt;|startoftext|&amp;gt; 's 'ſ 'S 'll 'LL 're 've 'm 'd 't ' ’s “q” &amp; & &;
    && &copy &copy; &D &ampx &#x27; &#39; &#39 &#xD800; &#28; &#133; &nbsp; &nbsp &Tab; &EACUTE;
    &notit; &amp;amp;amp; &LT; ; é e\u0301 Ã© â€™ ß ẞ İ ı Σ ΑΣ ſ ﬁ ﬆ Ａ １ ² ½ Ⅷ 日本 한국 क्षि العربية a
    B Word Straße 1 23 ! ?? ... - _ <b> ŉ Ǆ \u212a \u212b \u2126 … – \u0345 α\u0345 \u200b \ufeff
    \u0378 \U0003d000 \U000e0067 \U0010ffff 😀 \U0001f469\u200d\U0001f469\u200d\U0001f467 🇩🇪 ❤️ 👍🏽
    \ud800 \udc00 \ud83d\ude00
"""
_BLANKS = "\t\n\r\x0b\x0c\x1c\x1f \x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\x00\x1b\x7f"
PIECES = [*_WORDS.split(), *_BLANKS, "\r\n", "  ", "\x1b[31m"]

CAPTIONS = [
    "a diagram",
    "A photo of a cat.",
    "two dogs' toys, and one dog's bowl; they're on the kitchen floor",
    "Blue & white china, R&D lab &amp; Co., 50% off, $3.99, 10:45am",
    "itap of my favourite café in Zürich – “naïve” it’s…",
    "https://example.org/a_b?c=d&e=f#g user@example.org",
    "l'été à la plage; ¿qué pasa?; Москва; 日本の猫; 서울; שלום",
    "",
    "   ",
]


@pytest.fixture(scope="module")
def upstream():
    openai_clip()
    from clip import simple_tokenizer

    return simple_tokenizer


@pytest.fixture(scope="module")
def theirs(upstream):
    return upstream.SimpleTokenizer()


@pytest.fixture(scope="module")
def mine():
    return SimpleTokenizer()


def known_to_all(code: int) -> bool:
    import regex

    return regex.__version__ == REGEX_RELEASE or unicodedata.category(chr(code)) != "Cn"


def test_tables_are_those_of_openai(theirs, mine):
    for name in ("encoder", "decoder", "byte_encoder", "byte_decoder", "bpe_ranks"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.vocab_size == 49408
    assert list(bytes_to_unicode()) == list(theirs.byte_encoder)


@pytest.mark.parametrize("text", CAPTIONS + PIECES)
def test_ids_of_captions_and_pieces(theirs, mine, text):
    for variant in (text, text.upper(), f"x{text}y", f"!{text}{text} {text}", f"1 {text}\n"):
        assert mine.encode(variant) == theirs.encode(variant), ascii(variant)


def test_ids_of_random_mixtures(theirs, mine):
    rng = random.Random(0)
    for _ in range(6000):
        text = "".join(rng.choices(PIECES, k=rng.randint(2, 9)))
        assert mine.encode(text) == theirs.encode(text), ascii(text)


def test_ids_of_random_words(theirs, mine):
    # letters that merge often, so that words take many merge steps
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choices("aabcdeeghiilmnnoorsttu' 1", k=rng.randint(5, 60)))
        assert mine.encode(text) == theirs.encode(text), text


def test_ids_of_random_code_points(theirs, mine):
    rng = random.Random(2)
    tops = (0x80, 0x100, 0x3000, 0x10000, 0x20000, 0x110000)
    for _ in range(4000):
        codes = [rng.randrange(rng.choice(tops)) for _ in range(rng.randint(1, 12))]
        text = "".join(chr(code) for code in codes if known_to_all(code))
        assert mine.encode(text) == theirs.encode(text), ascii(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cn"]), max_size=40))
@example("\ud800")
def test_ids_of_any_text(theirs, mine, text):
    assert mine.encode(text) == theirs.encode(text)


def test_words_of_every_code_point(theirs):
    """Word boundaries around each character, as the pattern sees it: lower case, no blank but U+0020."""
    # beyond U+40000 are only tags and variation selectors, private use and unassigned code points
    codes = [*range(0x40000), *range(0x40000, 0xE0000, 61), *range(0xE0000, 0xE0200)]
    codes += range(0xE0200, 0x110000, 61)
    codes = [c for c in codes if not 0xD800 <= c < 0xE000 and known_to_all(c)]
    lowered = [chr(c).lower() for c in codes if not ours._WHITE_SPACE.match(chr(c)) or c == 0x20]
    for start in range(0, len(lowered), 256):
        text = " ".join(f"a{c}b1{c}!{c}" for c in lowered[start : start + 256])
        assert ours._words(text) == theirs.pat.findall(text), hex(codes[start])


def test_words_of_special_tokens_with_any_letter(theirs):
    for code in range(0x80, 0xFFFF):
        c = chr(code).lower()
        # only letters can be the other case of a letter
        if c.isalpha() and known_to_all(code):
            text = f"'{c} 'r{c} 'l{c} '{c}e <|{c}tartoftext|> <|star{c}oftext|> <|end{c}ftext|>"
            assert ours._words(text) == theirs.pat.findall(text), hex(code)


def test_white_space_is_that_of_regex():
    regex = pytest.importorskip("regex")
    everything = "".join(map(chr, range(0x110000)))
    assert "".join(ours._WHITE_SPACE.findall(everything)) == "".join(regex.findall(r"\s", everything))


def test_plain_ascii_needs_no_ftfy(upstream):
    """What the fast path leaves out changes nothing: all pairs of its characters, some around entities."""
    plain = ["\t", "\n", *map(chr, range(0x20, 0x7F))]
    texts = [a + b for a in plain for b in plain]
    ends = ("", "amp", "copy", "#39", "x27", "lt")
    texts += [f"x {a}&{b}{c} y" for a in " &#<a1" for b in plain for c in ends]
    for text in texts:
        slow = upstream.whitespace_clean(upstream.basic_clean(text)).lower()
        assert ours._clean(text) == slow, ascii(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("\t\n ab<>&;#x27ltgtamp'\"\\[31m~"), max_size=30))
def test_plain_ascii_is_unchanged_by_ftfy(text):
    ftfy = pytest.importorskip("ftfy")
    if "&" not in text:
        assert ftfy.fix_text(text) == text
        assert html.unescape(text) == text
    elif ";" not in text:
        assert ftfy.fix_text(text) == text


def test_lone_surrogate_is_the_replacement_character(theirs, mine):
    for text in ("\ud800", "a\udfffb", "\ude00\ud83d"):
        assert mine.encode(text) == theirs.encode(text)
    assert mine.encode("\ud800") == mine.encode("\ufffd")
    assert mine.encode("\ud83d\ude00") == mine.encode("😀")


def test_long_words_are_not_quadratic(theirs, mine):
    assert mine.encode("abcab" * 400) == theirs.encode("abcab" * 400)
    for text in ("ab" * 50_000, "a" * 100_000, "é日" * 50_000, "&" * 100_000, "'" * 100_000, " " * 100_000):
        start = time.perf_counter()
        ids = mine.encode(text)
        # about 0.1 s; quadratic merging takes minutes
        assert time.perf_counter() - start < 10
        assert mine.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_bpe_of_a_word(theirs, mine):
    for word in ("hello", "a", "</w>", "zzxqj", "<|endoftext|>", "<|startoftext|>", "Ãł"):
        assert mine.bpe(word) == theirs.bpe(word)


def test_decode(theirs, mine):
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(49408) for _ in range(20)]
        assert mine.decode(ids) == theirs.decode(ids)
    row = tokenize("a photo of a cat")[0]
    expected = theirs.decode(row.tolist())
    assert mine.decode(row) == mine.decode(row.numpy()) == expected
    with pytest.raises(KeyError):
        mine.decode([49408])


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=200))
def test_decode_inverts_encode(mine, word):
    assert mine.decode(mine.encode(word)) == word + " "


def test_encode_batch(mine):
    assert mine.encode_batch(CAPTIONS) == [mine.encode(text) for text in CAPTIONS]
    assert mine.encode_batch([]) == []
    assert mine.encode_batch("cat") == [mine.encode("cat")]


def test_full_cache_starts_again(monkeypatch):
    monkeypatch.setattr(ours, "_MAX_CACHED_WORDS", 5)
    small, fresh = SimpleTokenizer(), SimpleTokenizer()
    texts = [f"{text} <|endoftext|>" for text in CAPTIONS]
    assert [small.encode(text) for text in texts * 2] == [fresh.encode(text) for text in texts * 2]
    assert len(small._word_ids) <= 5
    small.encode("x" * 65)
    assert "x" * 65 not in small._word_ids


def test_threads_and_pickle(mine):
    copy = pickle.loads(pickle.dumps(mine))
    texts = [f"{text} {i}{text}" for i in range(50) for text in CAPTIONS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.encode, texts)) == mine.encode_batch(texts)


# tokenize


@pytest.mark.parametrize("truncate", [False, True])
def test_rows_of_openai(truncate):
    clip = openai_clip()
    texts = CAPTIONS + (["word " * 200, "word " * 75, "word " * 76] if truncate else ["word " * 75])
    expected = clip.tokenize(texts, truncate=truncate)
    rows = tokenize(texts, truncate=truncate)
    assert rows.dtype == expected.dtype == torch.int32
    assert torch.equal(rows, expected)
    assert torch.equal(tokenize(tuple(texts), truncate=truncate), expected)
    assert torch.equal(tokenize(np.array(texts), truncate=truncate), expected)


@pytest.mark.parametrize("context_length", [2, 3, 8, 16, 200])
def test_context_length(context_length):
    clip = openai_clip()
    texts = ["a photo of a large dog in the snow", "cat", ""]
    assert torch.equal(tokenize(texts, context_length, True), clip.tokenize(texts, context_length, True))


def test_shape_and_padding():
    rows = tokenize("a cat")
    assert rows.shape == (1, 77) and rows.is_contiguous()
    assert rows[0, :5].tolist() == [49406, 320, 2368, 49407, 0]
    assert not rows[0, 4:].any()
    assert tokenize([]).shape == (0, 77) and tokenize([], 5).dtype == torch.int32
    rows[0, 0] = 1
    assert tokenize("a cat")[0, 0] == 49406


def test_too_long_has_openai_s_message():
    clip = openai_clip()
    texts = ["short", "Word " * 76]
    messages = []
    for function in (tokenize, clip.tokenize):
        with pytest.raises(RuntimeError) as caught:
            function(texts)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] == f"Input {texts[1]} is too long for context length 77"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", "b", 3], r"texts\[2\] must be a str, not int"),
        ([b"a"], r"texts\[0\] must be a str, not bytes"),
        (["a", None], r"texts\[1\] must be a str, not NoneType"),
        (b"a", "not bytes"),
        (None, "not NoneType"),
        (7, "not int"),
    ],
)
def test_other_types_are_refused(texts, message):
    with pytest.raises(TypeError, match=message):
        tokenize(texts)


def test_bad_arguments(mine):
    for length in (1, 0, -3):
        with pytest.raises(ValueError, match="context_length must be at least 2"):
            tokenize("a", context_length=length)
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        mine.encode(b"a")


# files and imports


def test_damaged_table_is_reported(tmp_path, monkeypatch):
    damaged = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    content = bytearray(Path(default_bpe()).read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setattr(ours, "default_bpe", lambda: str(damaged))
    with pytest.raises(RuntimeError, match="bpe_simple_vocab_16e6.txt.gz is damaged: its sha256 is"):
        SimpleTokenizer()


def test_other_tables(tmp_path, theirs):
    same = tmp_path / "same.txt.gz"
    same.write_bytes(gzip.compress(gzip.decompress(Path(default_bpe()).read_bytes())))
    assert SimpleTokenizer(same).encode("a photo of a cat") == theirs.encode("a photo of a cat")

    small = tmp_path / "small.txt.gz"
    small.write_bytes(gzip.compress(b"header\nc a\nca t</w>\n"))
    tokenizer = SimpleTokenizer(str(small))
    assert tokenizer.vocab_size == 516
    assert tokenizer.encode("cat cab") == [513, 512, tokenizer.encoder["b</w>"]]
    assert pickle.loads(pickle.dumps(tokenizer)).vocab_size == 516

    (tmp_path / "text.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="text.gz is not a gzip file"):
        SimpleTokenizer(tmp_path / "text.gz")
    small.write_bytes(gzip.compress(b"header\nc a\nb\n"))
    with pytest.raises(ValueError, match="line 3: a merge is two tokens"):
        SimpleTokenizer(small)
    with pytest.raises(FileNotFoundError):
        SimpleTokenizer(tmp_path / "missing.gz")


def test_import_is_light_and_needs_neither_regex_nor_torchvision():
    program = """if True:
        import sys
        sys.modules.update({"regex": None, "torchvision": None, "transformers": None})
        import clipfast.tokenizer, clipfast.preprocess
        early = {"ftfy", "tokenizers"} & set(sys.modules)
        assert not early, early
        assert clipfast.tokenizer.default_tokenizer.cache_info().currsize == 0
        print(clipfast.tokenizer.tokenize("日本 😀 café’s")[0].argmax().item())
    """
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().isdigit()
