"""The demo's second half: real photographs and captions through towers of ViT-B/32's size, beside other libraries.

The weights are random, since nothing is downloaded: this shows speed and numerics, not understanding.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from clipfast import reference
from clipfast.bench.peers import module
from clipfast.checkpoints import to_huggingface
from clipfast.cpu import bfloat16_is_emulated
from clipfast.demo.digits import largest_gap
from clipfast.dispatch import backend
from clipfast.model import CLIP, architecture, build_model, convert_weights
from clipfast.preprocess import Preprocess
from clipfast.timing import interleaved, medians
from clipfast.tokenizer import tokenize
from clipfast.training.architectures import sizes_of

VIT_B_32 = sizes_of("ViT-B/32")
# in the packages themselves; scikit-image can fetch more, which the demo never asks for
FILES = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
        "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png motorcycle_right.png page.png "
        "retina.jpg rocket.jpg text.png",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
CAPTIONS = (
    "a portrait of an astronaut in an orange space suit with the American flag behind her",
    "a tabby cat looking straight into the camera",
    "a cup of espresso on a saucer, seen from above, with a spoon beside it",
    "a rocket standing on the launch pad between four lightning towers at night",
    "a black and white photograph of a man behind a camera on a tripod",
    "rows of old coins on a dark cloth",
    "a page of a book",
    "a motorcycle in a garage full of tools",
    "thousands of galaxies in a deep exposure of an empty patch of sky",
    "the full moon with its craters and dark plains",
    "a brick wall",
    "grass, close up",
    "grey gravel on a path",
    "the clock on the wall, blurred because the camera moved",
    "the back of a human eye with the optic nerve and fine red vessels",
    "stained tissue under a microscope",
    "a single cell under a microscope, with low contrast",
    "handwriting on crumpled paper, lit from one side",
    "a Chinese temple with a curved roof, painted red and gold, under a cloudy sky",
    "an orange dahlia in full bloom with leaves in the background",
    "a dog runs across a wet beach with a stick in its mouth",
    "two children share an umbrella on a rainy street while a yellow taxi waits at the corner",
    "fishing boats in the harbour at sunrise",
    "a plate of spaghetti with basil",
    "an empty railway station at night, the last train leaving in the distance and one passenger on the platform",
    "snow on the roofs of a mountain village",
    "a woman playing the cello",
    "a red bicycle leaning against a blue door",
    "skyscrapers mirrored in the windows of another skyscraper",
    "a market stall with melons, tomatoes, peppers and bunches of fresh herbs",
    "a hot-air balloon over the desert",
    "an old map of the world with sea monsters drawn in the oceans",
)
OURS = "clipfast"
PLAIN = "plain PyTorch"


def photographs() -> list[Path]:
    """The photographs in the installed scikit-image and scikit-learn; nothing is fetched."""
    found = []
    for package, (folder, names) in FILES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths = (Path(spec.origin).parent / folder / name for name in names.split())
            found += [path for path in paths if path.is_file()]
    return found


@dataclass(frozen=True)
class Contestant:
    """A library with the same weights. The calls take preprocessed images and token ids and return [B, E]."""

    name: str
    model: nn.Module
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: rates per second, and the largest 1 - cos to float64."""

    name: str
    dtype: str
    images_per_second: float
    texts_per_second: float
    image_gap: float
    text_gap: float


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    missing: dict[str, str]  # library -> why it does not take part
    n_images: int
    n_texts: int
    rounds: dict[str, int]  # dtype -> timed rounds
    left_out: dict[str, str]  # dtype -> why it was not timed


def contestants(
    device: torch.device, images: Tensor, text: Tensor
) -> tuple[dict[str, Tensor], list[Contestant], dict[str, str]]:
    """ViT-B/32 of random weights (fixed seed) in every library that is here and takes the inputs.

    Returns: (weights in float32, contestants, library -> why it is missing).
    """
    torch.manual_seed(0)
    weights = CLIP(**VIT_B_32).state_dict()
    fast, plain = build_model(weights).to(device), build_model(weights).to(device)
    for block in [*plain.visual.transformer.resblocks, *plain.transformer.resblocks]:
        # somebody who looks inside gets every module called, on full and padded rows, as openai/CLIP does
        block.attn.register_forward_hook(lambda module, inputs, output: None)
    found = [
        Contestant(OURS, fast, fast.encode_image, fast.encode_text),
        Contestant(PLAIN, plain, _on_torch(plain.encode_image), _on_torch(plain.encode_text)),
    ]
    missing = {}
    for name, package, build in (
        ("openai-clip", "clip", _openai_clip),
        ("transformers", "transformers", _transformers),
    ):
        if importlib.util.find_spec(package) is None:
            missing[name] = "not installed"
            continue
        try:
            peer = build(weights, device)
            peer.encode_image(images[:1]), peer.encode_text(text[:1])
            found.append(peer)
        except Exception as error:  # whatever is wrong with another library, the demo goes on without it
            missing[name] = f"does not run here: {type(error).__name__}: {error}".splitlines()[0]
    return {name: tensor.to(device) for name, tensor in weights.items()}, found, missing


def _on_torch(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(inputs: Tensor) -> Tensor:
        with backend("torch"):
            return encode(inputs)

    return call


def _openai_clip(weights: Mapping[str, Tensor], device: torch.device) -> Contestant:
    library = module("clip", "openai-clip").model
    model = library.CLIP(**architecture(weights))
    model.load_state_dict(weights)
    model.eval().to(device)
    return Contestant(f"openai-clip {_version('openai-clip', 'clip')}", model, model.encode_image, model.encode_text)


def _transformers(weights: Mapping[str, Tensor], device: torch.device) -> Contestant:
    library = module("transformers", "transformers")
    config = library.CLIPConfig(
        text_config={"hidden_act": "quick_gelu", "bos_token_id": 49406, "eos_token_id": 49407},
        vision_config={"hidden_act": "quick_gelu"},
    )
    model = library.CLIPModel(config)
    model.load_state_dict(to_huggingface(weights), strict=False)
    model.eval().to(device)

    def pooled(output) -> Tensor:
        return output if isinstance(output, Tensor) else output.pooler_output

    return Contestant(
        f"transformers {_version('transformers')}",
        model,
        lambda images: pooled(model.get_image_features(pixel_values=images.to(model.dtype))),
        lambda text: pooled(model.get_text_features(input_ids=text)),
    )


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def dtypes(device: torch.device) -> tuple[list[torch.dtype], dict[str, str]]:
    """float32 and the half precision that this device is fast in; and what is left out, and why."""
    if device.type != "cpu":
        return [torch.float32, torch.float16], {}
    emulated = bfloat16_is_emulated()
    if emulated:
        return [torch.float32], {"bfloat16": f"not timed: {emulated}"}
    return [torch.float32, torch.bfloat16], {}


@torch.no_grad()
def compare(device: torch.device, say: Callable[[Comparison, str], None], seconds: float = 40) -> Comparison:
    """Time every library on the same photographs, captions and weights, and compare each with float64.

    say: called after each dtype with what is known so far and the dtype's name.
    seconds: for all the timing, roughly; a dtype is left out once three quarters of them are spent.
    """
    files = photographs()
    images = Preprocess(VIT_B_32["image_resolution"])(tuple(files)).to(device)
    text = tokenize(CAPTIONS).to(device)
    weights, found, missing = contestants(device, images, text)
    exact_images, exact_text = reference.encode_image(weights, images), reference.encode_text(weights, text)
    # a GPU is idle with one copy
    copies = 1 if device.type == "cpu" else 16
    batch, texts = images.repeat(copies, 1, 1, 1), text.repeat(copies, 1)
    chosen, left_out = dtypes(device)
    comparison = Comparison([], missing, len(batch), len(texts), {}, left_out)
    start = time.perf_counter()
    # of each of the two towers
    share = seconds / len(chosen) / 2
    for number, dtype in enumerate(chosen):
        name = str(dtype).removeprefix("torch.")
        taken = time.perf_counter() - start
        if number and taken > 0.75 * seconds:
            left_out[name] = f"not timed: {taken:.0f} s went into {', '.join(comparison.rounds)}"
            continue
        if dtype != torch.float32:
            for one in found:
                one.model.to(dtype) if one.name.startswith("transformers") else convert_weights(one.model, dtype)
        image_answers: dict[str, Tensor] = {}
        text_answers: dict[str, Tensor] = {}
        image_calls = {one.name: _call(one.encode_image, batch, image_answers, one.name) for one in found}
        text_calls = {one.name: _call(one.encode_text, texts, text_answers, one.name) for one in found}
        image_times, image_rounds = _timed(image_calls, share)
        text_times, text_rounds = _timed(text_calls, share)
        comparison.rounds[name] = min(image_rounds, text_rounds)
        comparison.rows.extend(
            Row(
                one.name,
                name,
                len(batch) / image_times[one.name],
                len(texts) / text_times[one.name],
                largest_gap(image_answers[one.name][: len(images)], exact_images),
                largest_gap(text_answers[one.name][: len(text)], exact_text),
            )
            for one in found
        )
        say(comparison, name)
    return comparison


def _call(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, answers: dict[str, Tensor], name: str
) -> Callable[[], object]:
    """What is timed; its answer is kept, to be checked afterwards."""

    def call() -> None:
        answers[name] = encode(inputs)

    return call


def _timed(calls: dict[str, Callable[[], object]], seconds: float) -> tuple[dict[str, float], int]:
    """Median seconds of each call, and the number of rounds, which suits the machine: from 3 to 15."""
    # the warm-up round tells how many more there is time for
    first = interleaved(calls, rounds=1, warmup=0)
    rounds = min(15, max(3, int(seconds / sum(times[0] for times in first.values()))))
    return medians(interleaved(calls, rounds=rounds, warmup=0)), rounds
