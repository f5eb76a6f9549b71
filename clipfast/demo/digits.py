"""The demo's first half: a small CLIP learns scikit-learn's handwritten digits, then reads digits it has not seen."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipfast import reference
from clipfast.model import CLIP
from clipfast.preprocess import Preprocess
from clipfast.tokenizer import tokenize

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# what training says about a digit, and what classification says: none of these sentences is in both
TRAINED = (
    "a photo of the digit {word}.",
    "the number {numeral}",
    "a handwritten {word}",
    "handwritten digit: {numeral}",
    "{word}",
    "the numeral {numeral}, written by hand",
    "a {word} in pencil",
    "a blurry scan of the number {word}.",
)
PROMPTS = ("a photo of the number {word}.", "a handwritten {numeral}", "a scan of the digit {word}")
QUERIES = {"the number seven": 7, "a photo of a handwritten 3": 3, "eight, in pencil": 8, "zero.": 0, "a digit: 5": 5}

# 32 pixels: the 8 x 8 of the data, enlarged by the ordinary preprocessing
MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "image_resolution": 32,
    "vision_layers": 3,
    "vision_width": 128,
    "vision_patch_size": 16,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 64,
    "transformer_heads": 1,
    "transformer_layers": 1,
}
NEAREST = 8  # images for a query
PER_CLASS = 8  # images of each digit in a training batch
LEARNING_RATE = 1e-3
TIE = 1e-6  # cosines closer than this are one, in float32


@dataclass(frozen=True)
class Digits:
    """Real handwritten digits, 8 x 8 grey pictures, and their classes [n] int64: four fifths to learn, one to test."""

    train: tuple[Image.Image, ...]
    train_classes: Tensor
    test: tuple[Image.Image, ...]
    test_classes: Tensor


def load_digits() -> Digits:
    """The 1,797 digits that scikit-learn's package carries, split by class with a fixed seed."""
    from sklearn import datasets, model_selection

    data = datasets.load_digits()
    split = model_selection.train_test_split(
        data.images, data.target, test_size=0.2, stratify=data.target, random_state=0
    )

    def pictures(grey: np.ndarray) -> tuple[Image.Image, ...]:
        return tuple(Image.fromarray(np.rint(array * 255 / 16).astype(np.uint8)) for array in grey)

    train, test, train_classes, test_classes = split
    return Digits(pictures(train), torch.from_numpy(train_classes), pictures(test), torch.from_numpy(test_classes))


def captions(templates: tuple[str, ...], digit: int) -> list[str]:
    return [template.format(word=WORDS[digit], numeral=digit) for template in templates]


def train(digits: Digits, steps: int, device: torch.device, seed: int = 0) -> tuple[CLIP, list[float]]:
    """Contrastive training from scratch, with a bar on a terminal.

    A batch has PER_CLASS images of each digit, and with each image one caption of its digit. All pairs of one digit are
    positives: the targets share 1 among them, so plain cross-entropy, without false negatives.

    Returns: the model, and for each step its loss less the least possible one (the divergence from the targets).
    """
    torch.manual_seed(seed)
    model = CLIP(**MODEL).to(device).train()
    pixels = Preprocess(MODEL["image_resolution"])(digits.train).to(device)
    tokens = torch.stack([tokenize(captions(TRAINED, digit)) for digit in range(10)]).to(device)  # [10, templates, 77]
    of_class = [torch.nonzero(digits.train_classes == digit).flatten() for digit in range(10)]
    classes = torch.arange(10).repeat_interleave(PER_CLASS)
    targets = ((classes[:, None] == classes) / PER_CLASS).to(device)

    warm_up = max(1, steps // 10)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    losses = []
    for show in _progress(steps):
        chosen = torch.cat([rows[torch.randint(len(rows), (PER_CLASS,))] for rows in of_class])
        texts = tokens[classes, torch.randint(len(TRAINED), classes.shape)]
        per_image, per_text = model(_shifted(pixels[chosen.to(device)]), texts)
        loss = (F.cross_entropy(per_image, targets) + F.cross_entropy(per_text, targets)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        losses.append(loss.item() - math.log(PER_CLASS))
        show(losses[-1])
    return model.eval(), losses


def _shifted(images: Tensor, reach: int = 4) -> Tensor:
    """[B, 3, H, W], each moved by up to `reach` pixels both ways: a digit is the same a little to the left."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    down, across = torch.randint(2 * reach + 1, (2, batch, 1)).to(images.device)
    rows = down + torch.arange(height, device=images.device)  # [B, H]
    columns = across + torch.arange(width, device=images.device)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _progress(steps: int) -> Iterator[Callable[[float], None]]:
    """A function for each step, to be told its loss, which is shown: on a bar on a terminal, else in five lines."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    columns = min(100, shutil.get_terminal_size().columns)
    with tqdm(total=steps, unit="step", disable=not on_terminal, leave=False, ncols=columns) as bar:
        step = 0

        def show(loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if not on_terminal and (step == steps or step % max(1, steps // 5) == 0):
                print(f"   step {step} of {steps}: loss {loss:.3f}", flush=True)

        while step < steps:
            step += 1
            yield show


@dataclass(frozen=True)
class Reading:
    """What a model makes of the test digits. Embeddings have length 1 and are float32 on the CPU."""

    images: Tensor  # [n, E]
    texts: Tensor  # [10, E]: for each digit the mean over PROMPTS
    predictions: Tensor  # [n]
    confusion: Tensor  # [10, 10] counts: row the digit, column the prediction
    accuracy: float
    retrieved: dict[str, list[int]]  # query -> places of its nearest images, the nearest first
    precision: dict[str, float]


Encoder = Callable[[Tensor], Tensor]


@torch.no_grad()
def read(digits: Digits, encode_image: Encoder, encode_text: Encoder, pixels: Tensor) -> Reading:
    """Classify the test digits by PROMPTS, zero-shot as in the CLIP paper, and find images by QUERIES.

    pixels: [n, 3, R, R], digits.test preprocessed.
    """
    images = F.normalize(encode_image(pixels).float().cpu(), dim=-1)
    texts = _class_embeddings(encode_text)
    predictions = (images @ texts.T).argmax(dim=1)
    truth = digits.test_classes
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((truth, predictions), torch.tensor(1), accumulate=True)
    queries = F.normalize(encode_text(tokenize(list(QUERIES))).float().cpu(), dim=-1)
    nearest = (queries @ images.T).topk(NEAREST).indices
    retrieved = {query: places.tolist() for query, places in zip(QUERIES, nearest, strict=True)}
    precision = {query: (truth[retrieved[query]] == digit).double().mean().item() for query, digit in QUERIES.items()}
    accuracy = (predictions == truth).double().mean().item()
    return Reading(images, texts, predictions, confusion, accuracy, retrieved, precision)


def _class_embeddings(encode_text: Encoder) -> Tensor:
    """[10, E] of length 1: for each digit the mean direction of its prompts."""
    tokens = tokenize([caption for digit in range(10) for caption in captions(PROMPTS, digit)])
    rows = F.normalize(encode_text(tokens).cpu(), dim=-1).unflatten(0, (10, len(PROMPTS)))
    return F.normalize(rows.mean(dim=1), dim=-1)


@dataclass(frozen=True)
class Check:
    """Our predictions beside those of the float64 reference."""

    same: int
    ties: int  # differ, but the reference itself finds the two digits equally near
    different: int
    image_gap: float  # largest 1 - cos
    text_gap: float


@torch.no_grad()
def check(reading: Reading, state_dict: dict[str, Tensor], pixels: Tensor) -> Check:
    """Compare with plain PyTorch in float64, text padding and all, on the weights that were saved."""
    images = F.normalize(reference.encode_image(state_dict, pixels), dim=-1)
    texts = _class_embeddings(lambda tokens: reference.encode_text(state_dict, tokens))
    cosines = images @ texts.T
    best = cosines.max(dim=1).values
    ours = cosines.gather(1, reading.predictions[:, None]).squeeze(1)
    same = reading.predictions == cosines.argmax(dim=1)
    tie = ~same & (best - ours < TIE)
    return Check(
        same=int(same.sum()),
        ties=int(tie.sum()),
        different=int((~same & ~tie).sum()),
        image_gap=largest_gap(reading.images, images),
        text_gap=largest_gap(reading.texts, texts),
    )


def largest_gap(ours: Tensor, exact: Tensor) -> float:
    """The largest 1 - cos between rows [n, E]; NaN if a row has none."""
    a, b = (F.normalize(rows.detach().cpu().double(), dim=-1) for rows in (ours, exact))
    # half the squared distance of unit vectors: 1 - a.b itself loses every digit below 1e-16
    return ((a - b).square().sum(dim=-1) / 2).max().item()
