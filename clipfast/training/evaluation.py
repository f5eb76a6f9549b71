"""Zero-shot accuracy and image-text recall of a model, on samples read in worker processes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipfast.commands import CommandError, read_lines
from clipfast.inputs import pair
from clipfast.model import CLIP
from clipfast.preprocess import Preprocess
from clipfast.tokenizer import tokenize
from clipfast.training.data import BadSample, bad_sample, leave_the_group, texts_of
from clipfast.training.samples import TEMPLATES, ClassSamples, Samples
from clipfast.words import counted

__all__ = ["Evaluator", "class_names", "hit_rates", "retrieval", "zero_shot"]

RECALLS = (1, 5, 10)
# similarities held at once, 64 MB in float32
CELLS = 1 << 24


@dataclass(frozen=True)
class Evaluator:
    """How a model is asked.

    batch: images or texts at once.   autocast: context for the towers.
    bad:   samples that could not be read are added to it.
    """

    model: CLIP
    batch: int = 64
    workers: int = 0
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    bad: list[BadSample] = field(default_factory=list)

    @torch.no_grad()
    def images(self, samples: Samples, numbers: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        """Embeddings [n, E] float32 on the model's device, of length 1, and which of numbers they are of.

        Images of equal pixels are encoded once: in two places of a batch their last bits could differ.
        """
        preprocess = Preprocess(pair(self.model.visual.input_resolution)[0], output="uint8")
        loader = DataLoader(
            _Images(samples, numbers, preprocess),
            batch_size=self.batch,
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator(),
            worker_init_fn=leave_the_group,
        )
        rows, read = [torch.empty(0, self.model.visual.output_dim, device=self._device)], []
        first: dict[bytes, int] = {}  # digest of the pixels -> row
        place: list[int] = []
        for items in loader:
            self.bad.extend(image for _, image in items if isinstance(image, BadSample))
            fresh = []
            for number, image in items:
                if isinstance(image, Tensor):
                    digest = hashlib.blake2b(image.numpy()).digest()
                    if digest not in first:
                        first[digest] = len(first)
                        fresh.append(image)
                    read.append(number)
                    place.append(first[digest])
            if fresh:
                rows.append(self._encode(self.model.encode_image, torch.stack(fresh)))
        return torch.cat(rows)[place], np.array(read, dtype=np.int64)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [n, E] as of images; a text that is too long is cut."""
        tokens = tokenize(list(texts), self.model.context_length, truncate=True)
        distinct, place = tokens.unique(dim=0, return_inverse=True)
        rows = torch.cat([self._encode(self.model.encode_text, part) for part in distinct.split(self.batch)])
        return rows[place.to(rows.device)]

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with self.autocast():
            rows = encode(inputs.to(self._device))
        return F.normalize(rows.float(), dim=-1)


class _Images(Dataset):
    def __init__(self, samples: Samples, numbers: Sequence[int], preprocess: Preprocess):
        self._samples = samples
        self._numbers = numbers
        self._preprocess = preprocess

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> tuple[int, Tensor | BadSample]:
        i = int(self._numbers[place])
        try:
            return i, self._preprocess(self._samples.image(i))
        except (OSError, ValueError) as error:
            return i, bad_sample(self._samples.name(i), error)


# ---- zero-shot ----


def class_names(samples: Samples, file: Path | None = None) -> tuple[list[str], np.ndarray]:
    """The classes that prompts are made of, and the class of each sample, -1 where it has none.

    Samples in class folders have their folder's name, others their caption.
    file: a class a line. "folder<TAB>name" gives class folders a name; without tabs the lines are the names of the
          folders in sorted order, or for captions the classes there are.
    Raises: CommandError if file and samples do not agree.
    """
    lines = read_lines(file) if file is not None else None
    if isinstance(samples, ClassSamples):
        return _folder_names(samples, file, lines), samples.labels
    captions = [_only_caption(samples, i) for i in range(len(samples))]
    names = lines or sorted({caption for caption in captions if caption})
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({caption for caption in captions if caption} - set(numbers))
    if unknown:
        count = counted(len(unknown), "class", "classes")
        raise CommandError(f"{file} lacks {count} of the data: {', '.join(unknown[:3])}")
    return names, np.array([numbers.get(caption, -1) for caption in captions])


def _folder_names(samples: ClassSamples, file: Path | None, lines: list[str] | None) -> list[str]:
    if lines is None:
        return samples.classes
    if any("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines if "\t" in line)
        missing = [folder for folder in samples.folders if folder not in named]
        if missing:
            raise CommandError(f"{file} names no class for {counted(len(missing), 'folder')}: {', '.join(missing[:3])}")
        return [named[folder].strip() for folder in samples.folders]
    if len(lines) != len(samples.folders):
        count, wanted = counted(len(lines), "class", "classes"), counted(len(samples.folders), "folder")
        raise CommandError(f"{file} has {count}, but the data has {wanted}")
    return lines


def _only_caption(samples: Samples, i: int) -> str:
    """Empty if there is none, or it cannot be read: the image will be skipped too."""
    with contextlib.suppress(OSError, ValueError):
        return texts_of(samples, i)[0].strip()
    return ""


def zero_shot(
    evaluator: Evaluator, samples: Samples, templates: Sequence[str] = TEMPLATES, classes: Path | None = None
) -> dict[str, Any]:
    """Share of images whose class has the most similar prompt, and is among the five most similar.

    A class's embedding is the mean direction of its prompts, one a template (Radford et al. 2021, section 3.1.4).
    Returns: "zero_shot_top1", "zero_shot_top5", "images", "classes".
    Raises:  CommandError if no image can be read.
    """
    names, labels = class_names(samples, classes)
    for i in np.flatnonzero(labels < 0):
        evaluator.bad.append(BadSample(samples.name(int(i)), f"{samples.name(int(i))} has no class"))
    prompts = evaluator.texts([template.replace("{}", name) for name in names for template in templates])
    means = F.normalize(prompts.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)
    images, numbers = evaluator.images(samples, np.flatnonzero(labels >= 0))
    if not len(images):
        raise CommandError("zero-shot: none of the images can be read")
    truth = torch.from_numpy(labels[numbers]).to(images.device)
    rates = hit_rates(images, means, truth, torch.arange(len(names), device=images.device), (1, 5))
    return {"zero_shot_top1": rates[1], "zero_shot_top5": rates[5], "images": len(images), "classes": len(names)}


# ---- retrieval ----


def retrieval(evaluator: Evaluator, samples: Samples) -> dict[str, Any]:
    """How often a caption of the image is among the k most similar captions, and the other way round.

    Samples of the same name (rows of a table with one path) are one image with several captions.
    Returns: "image_to_text_recall@k" and "text_to_image_recall@k" for k = 1, 5, 10, "images", "captions".
    Raises:  CommandError if no image with a caption can be read.
    """
    captions, first = _captions_by_image(evaluator, samples)
    images, numbers = evaluator.images(samples, list(first))
    numbers = [first[i] for i in numbers.tolist()]
    texts = [caption for name in numbers for caption in captions[name]]
    if not texts:
        raise CommandError("retrieval: no image with a caption can be read")
    image_of_text = torch.tensor([i for i, name in enumerate(numbers) for _ in captions[name]], device=images.device)
    rows = evaluator.texts(texts)
    image_numbers = torch.arange(len(images), device=images.device)
    result: dict[str, Any] = {}
    for direction, rates in (
        ("image_to_text", hit_rates(images, rows, image_numbers, image_of_text)),
        ("text_to_image", hit_rates(rows, images, image_of_text, image_numbers)),
    ):
        result |= {f"{direction}_recall@{k}": rate for k, rate in rates.items()}
    return {**result, "images": len(images), "captions": len(texts)}


def _captions_by_image(evaluator: Evaluator, samples: Samples) -> tuple[dict[str, list[str]], dict[int, str]]:
    """Captions of each image's name, and the first sample of each name -> that name."""
    captions: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for i in range(len(samples)):
        name = samples.name(i)
        try:
            found = texts_of(samples, i)
        except (OSError, ValueError) as error:
            evaluator.bad.append(bad_sample(name, error))
            continue
        if name not in captions:
            captions[name] = []
            first[i] = name
        captions[name] += found
    return captions, first


def hit_rates(
    queries: Tensor, keys: Tensor, query_groups: Tensor, key_groups: Tensor, cutoffs: Sequence[int] = RECALLS
) -> dict[int, float]:
    """k -> share of queries with a key of their own among the k most similar keys.

    queries: [Q, E], keys: [K, E], of length 1; a key is a query's own if their groups ([Q], [K]) are equal.
    Keys that are as similar as the own one come in random order, and what counts is the expectation: a model that gives
    every input the same embedding is as good as chance. Equal keys are as similar to the bit: each is multiplied once,
    since a product's last bits depend on the column. Similarities are computed CELLS at a time.
    """
    distinct, place = keys.unique(dim=0, return_inverse=True)
    if len(distinct) == len(keys):
        distinct, place = keys, slice(None)
    rows = max(1, CELLS // max(1, len(keys)))
    hits = dict.fromkeys(cutoffs, 0.0)
    for part, groups in zip(queries.split(rows), query_groups.split(rows), strict=True):
        similarity, own = (part @ distinct.T)[:, place], groups[:, None] == key_groups
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        above = ((similarity > best) & ~own).sum(dim=1).double()
        level = ((similarity == best) & ~own).sum(dim=1).double()
        for k in cutoffs:
            hits[k] += ((k - above) / (level + 1)).clamp(0, 1).sum().item()
    return {k: value / len(queries) for k, value in hits.items()}
