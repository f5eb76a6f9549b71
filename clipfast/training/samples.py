"""Where pairs come from: folders and tables of images with captions (shards are in `shards.py`), one interface for all.

Looking for samples reads names only. An image that cannot be decoded or has no caption shows when it is read, raises
OSError or ValueError with its name, and is the reader's to skip.
"""

from __future__ import annotations

import csv
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from clipfast.commands import CommandError
from clipfast.preprocess import open_image

__all__ = [
    "FORMATS",
    "ClassSamples",
    "DataSource",
    "FolderSamples",
    "Samples",
    "Strings",
    "TableSamples",
    "find_samples",
]

FORMATS = ("auto", "folder", "classes", "table", "webdataset")
TEMPLATES = ("a photo of a {}.",)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".tsv", ".parquet")
# what is looked for where the user names no column; open_clip's own defaults are filepath and title
IMAGE_COLUMNS = ("filepath", "image_path", "path", "file_name", "filename", "file", "image")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "label", "class")


@dataclass(frozen=True)
class DataSource:
    """What the user said about the data: the arguments of `find_samples`."""

    paths: Sequence[str]
    format: str = "auto"
    image_column: str | None = None
    caption_column: str | None = None
    templates: Sequence[str] = field(default=TEMPLATES)


class Samples(ABC):
    """Images with captions, by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """What messages call sample i; samples of one name are captions of one image."""

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Raises OSError or ValueError if it cannot be read."""

    @abstractmethod
    def captions(self, i: int) -> Sequence[str]:
        """All captions of sample i, maybe none. Raises OSError or ValueError if they cannot be read."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of which samples these are, in which order; not of where or what the files are."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            digest.update(os.path.basename(self.name(i)).encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()[:16]


class Strings(Sequence[str]):
    """Many strings in two arrays. In a list, each worker process that reads one would copy its page to count it."""

    def __init__(self, strings: Iterable[str]):
        # surrogates: names of files that are not UTF-8
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i):
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogatepass")


class _Paths(Samples):
    """Images that are files."""

    def __init__(self, root: Path, paths: Iterable[str]):
        self._root = root
        self._paths = Strings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        return os.path.join(self._root, self._paths[i])

    def image(self, i: int) -> Image.Image:
        return open_image(self.name(i))


class FolderSamples(_Paths):
    """image.jpg with image.txt beside it; each line of the text that is not blank is a caption."""

    def captions(self, i: int) -> Sequence[str]:
        text = os.path.splitext(self.name(i))[0] + ".txt"
        with open(text, encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]


class ClassSamples(_Paths):
    """folder/class_name/image.jpg; the captions are the templates with the class in the place of {}.

    classes: their names, sorted; of sample i, classes[labels[i]].
    """

    def __init__(self, root: Path, paths: Sequence[str], templates: Sequence[str]):
        super().__init__(root, paths)
        folders = [Path(path).parts[0] for path in paths]
        self.folders = sorted(set(folders))
        self.classes = [folder.replace("_", " ") for folder in self.folders]
        numbers = {folder: number for number, folder in enumerate(self.folders)}
        self.labels = np.array([numbers[folder] for folder in folders])
        self._templates = templates

    def captions(self, i: int) -> Sequence[str]:
        return [template.replace("{}", self.classes[self.labels[i]]) for template in self._templates]


class TableSamples(_Paths):
    """Rows of (path, caption); a relative path starts at the folder of its table."""

    def __init__(self, rows: Iterable[tuple[str, str]]):
        paths, captions = [], []
        for path, caption in rows:
            paths.append(path)
            captions.append(caption)
        super().__init__(Path(), paths)
        self._captions = Strings(captions)

    def captions(self, i: int) -> Sequence[str]:
        return [self._captions[i]]


def find_samples(source: DataSource) -> Samples:
    """The samples that the user asked for, in an order that does not depend on the machine.

    Raises: CommandError if a path is not there or nothing is found, naming what was looked for; OSError.
    """
    from clipfast.training.shards import ShardSamples, expand

    kind = _kind(source)
    if kind == "webdataset":
        return ShardSamples(expand(source.paths), source.caption_column)
    paths = [Path(path).expanduser() for path in source.paths]
    for path in paths:
        if not path.exists():
            raise CommandError(f"no data: {path} is not there")
    if kind == "table":
        samples = TableSamples(row for path in paths for row in _rows(path, source))
        if not len(samples):
            raise CommandError(f"no data: {', '.join(map(str, paths))} has no rows")
        return samples
    if len(paths) > 1 or not paths[0].is_dir():
        raise CommandError(f"format {kind!r} takes one folder, got {', '.join(map(str, paths))}")
    return _folder(paths[0], kind, source.templates)


def _kind(source: DataSource) -> str:
    if source.format != "auto":
        return source.format
    suffixes = {os.path.splitext(path)[1].lower() for path in source.paths}
    if suffixes <= set(TABLES):
        return "table"
    folders = [os.path.isdir(path) for path in source.paths]
    if all(folders) and not _has_shards(source.paths[0]):
        return "auto"
    if any(folders) or any(".tar" in path for path in source.paths):
        return "webdataset"
    known = f"a folder, a table ({', '.join(TABLES)}) or shards (.tar)"
    raise CommandError(f"no data: {', '.join(source.paths)} is not {known}")


def _has_shards(path: str) -> bool:
    return os.path.isdir(path) and any(name.endswith(".tar") for name in os.listdir(path))


def _folder(root: Path, kind: str, templates: Sequence[str]) -> Samples:
    images, texts = [], set()
    # sorted: the order of a directory differs from machine to machine
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        inside = os.path.relpath(folder, root)
        for file in sorted(files):
            stem, suffix = os.path.splitext(os.path.join("" if inside == "." else inside, file))
            if suffix.lower() in SUFFIXES:
                images.append(stem + suffix)
            elif suffix == ".txt":
                texts.add(stem)
    if not images:
        raise CommandError(f"no data: {root} has no images ({' '.join(SUFFIXES)})")
    if kind == "auto":
        kind = "folder" if any(os.path.splitext(path)[0] in texts for path in images) else "classes"
    if kind == "folder":
        return FolderSamples(root, images)
    flat = [path for path in images if os.path.dirname(path) == ""]
    if flat:
        wanted = f"no {os.path.splitext(flat[0])[0]}.txt beside it, nor a folder that names its class"
        raise CommandError(f"no captions: {root / flat[0]} has {wanted}")
    return ClassSamples(root, images, templates)


def _rows(path: Path, source: DataSource) -> Iterator[tuple[str, str]]:
    """(path, caption) of each row; several where a Parquet row has a list of captions."""
    read = _parquet if path.suffix.lower() == ".parquet" else _csv
    for image, captions in read(path, source):
        image = os.path.join(path.parent, image or "")
        for caption in captions if isinstance(captions, (list, tuple)) else [captions]:
            yield image, "" if caption is None else str(caption)


def _columns(path: Path, columns: Sequence[str], source: DataSource) -> list[str]:
    """The names of the image column and of the caption column."""
    found = []
    wishes = (("image", source.image_column, IMAGE_COLUMNS), ("caption", source.caption_column, CAPTION_COLUMNS))
    for what, asked, usual in wishes:
        name = next((name for name in ([asked] if asked else usual) if name in columns), None)
        if name is None:
            tried = asked or ", ".join(usual)
            raise CommandError(f"{path} has no {what} column ({tried}); its columns are {', '.join(columns)}")
        found.append(name)
    return found


def _csv(path: Path, source: DataSource) -> Iterator[tuple[str | None, str | None]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            # by what is in it: open_clip's tables are called .csv and have tabs
            reader = csv.DictReader(file, delimiter="\t" if "\t" in head else ",")
            image, caption = _columns(path, reader.fieldnames or [], source)
            for row in reader:
                yield row[image], row[caption]
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except csv.Error as error:
        raise CommandError(f"{path} is not a table, line {reader.line_num}: {error}") from error


def _parquet(path: Path, source: DataSource) -> Iterator[tuple[str | None, str | list[str] | None]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise CommandError(f"{path} needs pyarrow: pip install 'clipfast[train]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = _columns(path, file.schema_arrow.names, source)
            for batch in file.iter_batches(columns=names):
                yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
    except ArrowInvalid as error:
        raise CommandError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error
