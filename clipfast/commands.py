"""What `clipfast classify`, `encode` and `models` do; `cli.py` has their arguments.

A file that cannot be used is named on stderr and left out; the others are done, and the status is 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipfast.checkpoints import available_models, load
from clipfast.files import check_file, size_of, write_atomically
from clipfast.inputs import is_here
from clipfast.ops import logits
from clipfast.tokenizer import tokenize
from clipfast.words import counted

__all__ = ["CommandError", "Source", "classify", "encode", "models", "pick_device", "read_lines"]


class CommandError(Exception):
    """A failure whose text is meant for the user as it is."""


@dataclass(frozen=True)
class Source:
    """Which model, and how: the arguments of `load`, and how many images or texts go through it at once."""

    name: str
    device: str | None = None
    dtype: str | None = None
    activation: str | None = None
    batch: int = 32


def models() -> int:
    """Print the names that `--model` and `load` know."""
    print("\n".join(available_models()))
    return 0


def classify(
    images: Sequence[Path],
    source: Source,
    labels: Sequence[str],
    *,
    template: str = "a photo of a {}.",
    top: int = 5,
    as_json: bool = False,
) -> int:
    """Print the probability of each label for each image, the likeliest first.

    template: the caption of a label, which replaces "{}".
    Returns:  0, or 1 if an image could not be read.
    Raises:   CommandError, or what `load` raises.
    """
    encoder = _Encoder(source)
    texts, too_long = encoder.texts([template.replace("{}", label) for label in labels])
    if too_long:
        raise CommandError(f"the caption of {_short(labels[too_long[0]])} is too long ({encoder.limit})")
    records: list[dict] = []
    for chunk in encoder.read(images):
        rows = encoder.images([pixels for _, pixels in chunk if isinstance(pixels, Tensor)])
        probabilities = iter(logits(rows, texts, encoder.logit_scale)[0].softmax(dim=-1))
        for path, read in chunk:
            if isinstance(read, str):
                records.append({"image": str(path), "error": read})
                continue
            values, order = next(probabilities).topk(min(top, len(labels)))
            ranking = [(labels[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]
            records.append({"image": str(path), "labels": [{"label": k, "probability": v} for k, v in ranking]})
            if not as_json:
                lines = [f"  {100 * value:6.2f} %  {label}" for label, value in ranking]
                print("\n".join([_printable(path), *lines]), flush=True)
    if as_json:
        print(json.dumps(records, indent=2))
    return 1 if any("error" in record for record in records) else 0


def encode(
    images: Sequence[Path],
    source: Source,
    out: Path,
    *,
    text: Path | None = None,
    normalize: bool = False,
    truncate: bool = False,
    written: list[Path] | None = None,
) -> int:
    """Write the embeddings of images, and of the lines of a text file, to one .npz file.

    The file has image_embeddings [n, E] float32, image_paths [n], text_embeddings [m, E] float32 and texts [m]: row i
    belongs to path or text i, in the order given, without those left out. It appears whole or not at all.
    written: `out` is added to it once it is there.
    Returns: 0, or 1 if an image could not be read or a text was too long.
    Raises:  OSError, before the work, if `out` cannot be written; CommandError if nothing is left to write; what `load`
             raises.
    """
    check_file(out)
    texts = [] if text is None else read_lines(text)
    encoder = _Encoder(source)
    text_rows, too_long = encoder.texts(texts, truncate)
    for i in too_long:
        _complain(f"{text}: left out, {encoder.limit} (--truncate cuts it): {_short(texts[i])}")
    texts = [line for i, line in enumerate(texts) if i not in set(too_long)]
    image_rows, paths = [encoder.images([])], []
    for chunk in encoder.read(images, progress=True):
        good = [(str(path), pixels) for path, pixels in chunk if isinstance(pixels, Tensor)]
        paths += [path for path, _ in good]
        image_rows.append(encoder.images([pixels for _, pixels in good]))
    if not paths and not texts:
        raise CommandError(f"nothing is left to write, so {out} was not written")
    tables = {"image_embeddings": torch.cat(image_rows), "text_embeddings": text_rows}
    if normalize:
        tables = {name: torch.nn.functional.normalize(table, dim=-1) for name, table in tables.items()}
    arrays = {name: table.numpy() for name, table in tables.items()}
    arrays |= {"image_paths": np.array(paths, dtype=str), "texts": np.array(texts, dtype=str)}
    write_atomically(out, lambda file: np.savez(file, **arrays), size_of(arrays))
    if written is not None:
        written.append(out)
    left_out = len(images) - len(paths) + len(too_long)
    done = f"{out}: {counted(len(paths), 'image')} and {counted(len(texts), 'text')}, {text_rows.shape[1]} numbers each"
    print(done + (f"; {left_out} left out" if left_out else ""))
    return 1 if left_out else 0


class _Encoder:
    """A loaded model that takes files and texts of any number and gives float32 rows [n, E] on the CPU."""

    def __init__(self, source: Source):
        self.device = pick_device(source.device)
        self.batch = source.batch
        self.model, self.preprocess = load(source.name, self.device, dtype=source.dtype, activation=source.activation)
        self.context_length = self.model.context_length
        self.limit = f"more than {self.context_length} tokens"
        self.logit_scale = self.model.logit_scale.detach().float().cpu()

    @torch.no_grad()
    def images(self, pixels: Sequence[Tensor]) -> Tensor:
        """[3, n, n] each -> [len(pixels), E]."""
        if not pixels:
            return torch.empty(0, self.model.visual.output_dim)
        return self.model.encode_image(torch.stack(list(pixels)).to(self.device)).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], truncate: bool = False) -> tuple[Tensor, list[int]]:
        """The rows of the texts that fit, and the places of those that do not."""
        tokenize("")  # a damaged vocabulary raises here, so that below a RuntimeError can only mean "too long"
        ids, too_long = [], []
        for i, text in enumerate(texts):
            try:
                ids.append(tokenize(text, self.context_length, truncate))
            except RuntimeError:
                too_long.append(i)
        if not ids:
            return torch.empty(0, self.model.text_projection.shape[1]), too_long
        parts = torch.cat(ids).to(self.device).split(self.batch)
        return torch.cat([self.model.encode_text(part).float().cpu() for part in parts]), too_long

    def read(self, paths: Sequence[Path], *, progress: bool = False) -> Iterator[list[tuple[Path, Tensor | str]]]:
        """Batches of (path, [3, n, n] or why it cannot be read); the reason is on stderr already."""
        from tqdm import tqdm

        # disable=None: a bar on a terminal only
        bar = tqdm(total=len(paths), unit="image", disable=None if progress else True)
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(paths), self.batch):
                names = paths[start : start + self.batch]
                chunk = list(zip(names, pool.map(self._read_one, names), strict=True))
                for _, result in chunk:
                    if isinstance(result, str):
                        bar.clear()
                        _complain(result)
                yield chunk
                bar.update(len(chunk))

    def _read_one(self, path: Path) -> Tensor | str:
        try:
            return self.preprocess(path)
        except OSError as error:
            return f"{path}: {error.strerror or error}"
        except ValueError as error:
            return str(error)


def pick_device(name: str | None) -> torch.device:
    """The device of this name, or the GPU if there is one, else the CPU; CommandError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CommandError(f"unknown device {name!r}; cpu, cuda, cuda:1 are some") from None
    if not is_here(device):
        raise CommandError(f"device {name!r} is not here: PyTorch sees {counted(torch.cuda.device_count(), 'GPU')}")
    return device


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank; CommandError if there is none or it is no text."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise CommandError(f"{path} has no line of text")
    return lines


def _complain(message: str) -> None:
    print(f"clipfast: {message}", file=sys.stderr)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _printable(path: Path) -> str:
    # a name that is not UTF-8 must not stop the printing
    return str(path).encode(errors="backslashreplace").decode()
