"""Samples to batches of pairs: decoded, cropped and tokenised in worker processes, the same for any number of them.

Which samples a step gets, in which order, with which crop and caption follows from (seed, epoch, sample) alone. So
nothing changes with the number of workers, or when a run goes on in the middle of an epoch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipfast.commands import CommandError
from clipfast.preprocess import Preprocess
from clipfast.tokenizer import tokenize
from clipfast.training.samples import Samples
from clipfast.words import counted

__all__ = [
    "BadSample",
    "Batch",
    "BatchOrder",
    "PairDataset",
    "RandomResizedCrop",
    "bad_sample",
    "leave_the_group",
    "make_loader",
    "texts_of",
]

# a run of this many samples that cannot be read is no bad luck
MOST_TRIES = 100

Transform = Callable[[Image.Image, np.random.Generator], Tensor]


class BadSample(NamedTuple):
    """A sample that was skipped."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Pairs for one step of one process."""

    images: Tensor  # [B, 3, R, R] uint8
    tokens: Tensor  # [B, context] int32
    bad: list[BadSample]  # what others stand in for


class RandomResizedCrop:
    """A random part of the image, scaled to n x n with bicubic interpolation: [3, n, n] uint8.

    scale: least and greatest share of the image's area.   ratio: least and greatest width / height before scaling.
    Source: Szegedy et al. 2015, arXiv:1409.4842; the ranges are open_clip's for training.
    """

    def __init__(self, n_px: int, scale: tuple[float, float] = (0.9, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)):
        self.n_px = n_px
        self.scale = scale
        self.ratio = ratio
        self._to_tensor = Preprocess(n_px, output="uint8")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        box = self.box(*image.size, rng)
        image = image if image.mode == "RGB" else image.convert("RGB")
        return self._to_tensor(image.crop(box).resize((self.n_px, self.n_px), Image.Resampling.BICUBIC))

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) inside the image."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
                return left, top, left + across, top + down
        # no such part was found in a long image: the largest in the middle whose shape is allowed
        across = min(width, max(1, round(height * self.ratio[1])))
        down = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down


def texts_of(samples: Samples, i: int) -> list[str]:
    """The captions of sample i that are not empty, at least one; ValueError or OSError says why there is none."""
    captions = samples.captions(i)
    wrong = [caption for caption in captions if not isinstance(caption, str)]
    if wrong:
        raise ValueError(f"{samples.name(i)} has a caption that is no text: {wrong[0]!r}")
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise ValueError(f"{samples.name(i)} has an empty caption")
    return captions


def bad_sample(name: str, error: Exception) -> BadSample:
    """The sample and why it cannot be used; the reason has the name too."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return BadSample(name, reason if name in reason else f"{name}: {reason}")


class PairDataset(Dataset):
    """Batches by [(epoch, sample), ...]. A sample that cannot be read is named, and another stands in for it.

    The other one is drawn by (seed, epoch, sample) too. So every process has the rows that it announced, and the loss
    across processes stays exact; in rare cases a batch holds one sample twice.
    """

    def __init__(self, samples: Samples, transform: Transform, context_length: int, seed: int):
        self.samples = samples
        self._transform = transform
        self._context_length = context_length
        self._seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        images, captions = [], []
        bad: list[BadSample] = []
        for epoch, i in keys:
            image, caption = self._read(i, np.random.default_rng((self._seed, epoch, i)), bad)
            images.append(image)
            captions.append(caption)
        return Batch(torch.stack(images), tokenize(captions, self._context_length, truncate=True), bad)

    def _read(self, i: int, rng: np.random.Generator, bad: list[BadSample]) -> tuple[Tensor, str]:
        for _ in range(MOST_TRIES):
            try:
                captions = texts_of(self.samples, i)
                caption = captions[rng.integers(len(captions))]
                return self._transform(self.samples.image(i), rng), caption
            except (OSError, ValueError) as error:
                bad.append(bad_sample(self.samples.name(i), error))
                i = int(rng.integers(len(self.samples)))
        raise CommandError(f"{MOST_TRIES} samples in a row cannot be read; the last: {bad[-1].reason}")


class BatchOrder:
    """The keys of every step from `start` on: each epoch its own permutation of n samples, without the rest.

    batch: pairs per step, of which process `rank` of `world` gets its equal share. What a step holds does not depend on
    the number of processes.
    """

    def __init__(self, n: int, batch: int, steps: int, seed: int, *, start: int = 0, rank: int = 0, world: int = 1):
        if n < batch:
            raise CommandError(f"the data has {counted(n, 'sample')}, fewer than one batch of {batch} (--batch-size)")
        if batch % world:
            raise CommandError(f"a batch of {batch} (--batch-size) does not divide among {world} processes")
        self.n = n
        self.batch = batch
        self.steps = steps
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.world
        done = -1
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != done:
                order, done = self.order(epoch), epoch
            first = place * self.batch + self.rank * share
            yield [(epoch, int(i)) for i in order[first : first + share]]

    def order(self, epoch: int) -> np.ndarray:
        """The samples in the order of this epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.n)


def make_loader(dataset: PairDataset, order: BatchOrder, workers: int, *, pin: bool = False) -> DataLoader:
    """Batches of all steps of the order; one set of workers for all epochs."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        # its own: else it draws from torch's generator
        generator=torch.Generator(),
        worker_init_fn=leave_the_group,
    )


def leave_the_group(worker: int) -> None:
    """Of a DataLoader, its worker_init_fn."""
    # Ctrl-C in a terminal and torchrun's SIGTERM go to the whole process group; the main process finishes its step and
    # still needs its workers. Ignoring the signals would not do: at exit multiprocessing ends them by SIGTERM.
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _as_it_is(batch: Batch) -> Batch:
    return batch
