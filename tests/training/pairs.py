"""Small data and models for the tests of training."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

import clipfast

# arguments of CLIP: a model of 0.9 million parameters, most of them in the vocabulary
TINY = {
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 64,
    "vision_patch_size": 16,
    "context_length": 16,
    "vocab_size": 49408,
    "transformer_width": 16,
    "transformer_heads": 1,
    "transformer_layers": 1,
}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def make_model() -> clipfast.CLIP:
    return clipfast.CLIP(**TINY)


def write_model(folder: Path) -> Path:
    """The architecture as a file for --model."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def make_image(number: int, size: tuple[int, int] = (44, 36)) -> Image.Image:
    """Noise around a colour, another one for each number."""
    rng = np.random.default_rng(number)
    colour = np.array(list(COLOURS.values())[number % 3])
    noise = rng.integers(-30, 31, (size[1], size[0], 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def caption_of(number: int) -> str:
    return f"{list(COLOURS)[number % 3]} number {number}"


def write_folder(root: Path, n: int) -> Path:
    """n images with a text beside each, in two folders."""
    for number in range(n):
        folder = root / ("a" if number % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        make_image(number).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(caption_of(number) + "\n")
    return root


def write_classes(root: Path, n: int) -> Path:
    """n images in a folder for each colour, "dark_red" and so on."""
    for number in range(n):
        folder = root / f"dark_{list(COLOURS)[number % 3]}"
        folder.mkdir(parents=True, exist_ok=True)
        make_image(number).save(folder / f"{number:03}.png")
    return root


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    make_image(number).save(buffer, "png")
    return buffer.getvalue()


def write_shards(root: Path, n: int, shards: int = 2) -> list[Path]:
    """n samples in shard-0.tar, shard-1.tar ..., captions as text in the even ones and as JSON in the odd ones."""
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        paths.append(root / f"shard-{shard}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for number in range(shard, n, shards):
                add_member(archive, f"{number:03}.png", png(number))
                if shard % 2:
                    record = json.dumps({"caption": caption_of(number), "width": 44})
                    add_member(archive, f"{number:03}.json", record.encode())
                else:
                    add_member(archive, f"{number:03}.txt", caption_of(number).encode())
    return paths
