"""The demo's first half: a small CLIP learns scikit-learn's handwritten digits, then reads digits it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from clipfast.training.data import BadSample, BatchOrder, PairDataset
from clipfast.training.metrics import progress
from clipfast.training.optimization import Recipe
from clipfast.training.samples import Samples
from clipfast.training.trainer import Trainer

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


class DigitPairs(Samples):
    """The digits to learn, each with the captions of its class."""

    def __init__(self, digits: Digits):
        self._digits = digits

    def __len__(self) -> int:
        return len(self._digits.train)

    def name(self, i: int) -> str:
        return f"digit {i}"

    def image(self, i: int) -> Image.Image:
        return self._digits.train[i]

    def captions(self, i: int) -> list[str]:
        return captions(TRAINED, int(self._digits.train_classes[i]))


class BalancedOrder(BatchOrder):
    """Batches of PER_CLASS images of each digit, the zeros first, the nines last."""

    def __init__(self, classes: Tensor, steps: int, seed: int):
        super().__init__(len(classes), 10 * PER_CLASS, steps, seed)
        self._of_class = [np.flatnonzero(classes.numpy() == digit) for digit in range(10)]

    @property
    def steps_per_epoch(self) -> int:
        return min(map(len, self._of_class)) // PER_CLASS

    def order(self, epoch: int) -> np.ndarray:
        rng, n = np.random.default_rng((self.seed, epoch)), self.steps_per_epoch * PER_CLASS
        columns = [rng.permutation(rows)[:n].reshape(-1, PER_CLASS) for rows in self._of_class]
        return np.hstack(columns).ravel()


class Shift:
    """Scales a digit and moves it by up to `reach` pixels both ways: it is the same a little to the left."""

    def __init__(self, resolution: int, reach: int = 4):
        self._preprocess = Preprocess(resolution, output="uint8")
        self._reach = reach

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        n = self._preprocess.n_px
        wide = np.pad(self._preprocess(image).numpy(), ((0, 0), *[(self._reach,) * 2] * 2), mode="edge")
        down, across = rng.integers(2 * self._reach + 1, size=2)
        return torch.from_numpy(wide[:, down : down + n, across : across + n].copy())


def class_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Contrastive loss of a balanced batch, less the least possible one: the divergence from the targets.

    All pairs of one digit are positives: the targets share 1 among them, so there are no false negatives.
    """
    classes = torch.arange(10, device=image.device).repeat_interleave(PER_CLASS)
    targets = (classes[:, None] == classes) / PER_CLASS
    logits = logit_scale * image @ text.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2 - math.log(PER_CLASS)


def train(digits: Digits, steps: int, device: torch.device, seed: int = 0) -> tuple[CLIP, list[float]]:
    """Contrastive training from scratch by `clipfast.training`, with a bar on a terminal.

    Returns: the model, and the loss of each step.
    """
    torch.manual_seed(seed)
    model = CLIP(**MODEL).to(device)
    dataset = PairDataset(DigitPairs(digits), Shift(MODEL["image_resolution"]), MODEL["context_length"], seed)
    order = BalancedOrder(digits.train_classes, steps, seed)
    recipe = Recipe(steps=steps, lr=LEARNING_RATE, warmup=steps // 10, weight_decay=0.1)
    losses = []
    with progress(steps, lines=5) as bar:

        def after_step(metrics: dict[str, Any], bad: list[BadSample]) -> None:
            losses.append(metrics["loss"])
            bar.show(metrics["loss"])

        Trainer(model, dataset, order, recipe, loss=class_loss).run(after_step)
    return model.eval(), losses


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
