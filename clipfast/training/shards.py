"""WebDataset shards: tar files in which 0001.jpg and 0001.txt (or 0001.json) belong together.

Each shard's headers are read once. From then on every sample is a position in a file, so the order is ours and any
sample can be read alone. The format: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipfast.commands import CommandError
from clipfast.preprocess import decode_image
from clipfast.training.samples import SUFFIXES, Samples, Strings
from clipfast.words import counted

__all__ = ["ShardSamples", "expand"]

JSON_CAPTIONS = ("caption", "text", "captions")


def expand(patterns: Sequence[str]) -> list[str]:
    """Shards named by "shard-{0000..0099}.tar", "{train,extra}/*.tar", plain paths and folders of .tar files.

    Raises: CommandError if a pattern names nothing, or a shard is not there.
    """
    shards: list[str] = []
    for pattern in patterns:
        for name in _braces(os.path.expanduser(pattern)):
            if os.path.isdir(name):
                name = os.path.join(glob.escape(name), "*.tar")
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
            if not found:
                raise CommandError(f"no data: there is no shard {name}")
            shards += found
    return shards


def _braces(pattern: str) -> Iterator[str]:
    """{3..5} as 3, 4, 5, as wide as its first number is written; {a,b} as a, b."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, choices = match.groups()
    values = choices.split(",") if choices else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    for value in values:
        yield from _braces(pattern[: match.start()] + value + pattern[match.end() :])


class ShardSamples(Samples):
    """Samples of tar files: of each key an image, and a caption in key.txt or in a field of key.json.

    shards:       their paths; compressed ones are refused, as nothing in them can be reached alone.
    caption_key:  field of the JSON file; default: caption, text or captions. A list there is several captions.
    Raises: CommandError if a shard is no tar file or none has an image.
    """

    def __init__(self, shards: Sequence[str], caption_key: str | None = None):
        self._shards = list(shards)
        self._keys = (caption_key,) if caption_key else JSON_CAPTIONS
        names: list[str] = []
        # per sample: shard; offset and size of the image, of the text, of the JSON (size -1: there is none)
        places: list[tuple[int, ...]] = []
        for number, shard in enumerate(tqdm(self._shards, desc="shards", unit="shard", disable=None, leave=False)):
            for key, members in _index(shard).items():
                image = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
                if image is not None:
                    names.append(key)
                    none = (0, -1)
                    places.append((number, *image, *members.get(".txt", none), *members.get(".json", none)))
        if not places:
            raise CommandError(f"no data: no images ({' '.join(SUFFIXES)}) in {', '.join(self._shards[:3])}")
        self._names = Strings(names)
        self._places = np.array(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, i: int) -> str:
        return f"{self._shards[self._places[i, 0]]}/{self._names[i]}"

    def image(self, i: int) -> Image.Image:
        return decode_image(io.BytesIO(self._read(i, 1)), self.name(i))

    def captions(self, i: int) -> Sequence[str]:
        # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if self._places[i, 4] >= 0:
            # all of it is one caption, as in open_clip: those from the web have line breaks
            return [self._read(i, 3).decode("utf-8").strip()]
        if self._places[i, 6] < 0:
            raise ValueError(f"{self.name(i)} has neither .txt nor .json")
        record = json.loads(self._read(i, 5))
        found = [record[key] for key in self._keys if key in record] if isinstance(record, dict) else []
        if not found:
            raise ValueError(f"{self.name(i)}.json has no field {' or '.join(self._keys)}")
        return found[0] if isinstance(found[0], list) else [found[0]]

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join(map(os.path.basename, self._shards)).encode("utf-8", "surrogatepass"))
        digest.update(self._places.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def _read(self, i: int, column: int) -> bytes:
        shard = self._shards[self._places[i, 0]]
        offset, size = self._places[i, column : column + 2].tolist()
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{self.name(i)} is cut short: {shard} ends in it")
        return content


def _index(shard: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> suffix -> (offset, size), in the order of the file."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        # "r:" refuses compression
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, dot, suffix = name.partition(".")
                if member.isreg() and stem and dot:
                    places = samples.setdefault(os.path.join(folder, stem), {})
                    places[f".{suffix.lower()}"] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not samples:
            raise CommandError(f"{shard} is no plain tar file ({error}); compressed shards must be unpacked") from error
        before = counted(len(samples), "sample")
        print(f"clipfast: {shard} is damaged ({error}); used, from before that: {before}", file=sys.stderr)
    return samples
