"""clipfast.preprocess against openai/CLIP's transform: the same float32 bits."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfast.preprocess import MEAN, STD, Preprocess, normalize, open_image
from tests.peers import openai_clip

FILES = [
    "astronaut.png",  # RGB 512 x 512
    "coffee.png",  # RGB 600 x 400
    "chelsea.png",  # RGB 451 x 300
    "rocket.jpg",  # RGB 640 x 427
    "hubble_deep_field.jpg",
    "camera.png",  # L
    "logo.png",  # RGBA
    "no_time_for_that_tiny.gif",  # P, 14 x 25, several frames
]

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa"]
MODES += ["CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]


def photographs() -> Path:
    return Path(pytest.importorskip("skimage").__file__).parent / "data"


@pytest.fixture(scope="module")
def transform():
    """openai/CLIP's transform for a size."""
    openai_clip()
    from clip import clip

    return clip._transform


@pytest.fixture(scope="module")
def cat():
    with Image.open(photographs() / "chelsea.png") as image:
        return image.convert("RGB")


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        # 0 .. 510: Pillow clips half of the range
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 2)
    if mode == "I":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 3 - 200)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) * 1.7 - 30.25)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        width, height = image.size
        image.putalpha(Image.linear_gradient("L").resize((width, height)))
        return image
    if mode == "RGBa":
        return as_mode(image, "RGBA").convert(mode)
    if mode == "PA":
        return image.convert("P").convert(mode)
    if mode == "LAB":
        return Image.frombytes(mode, image.size, image.tobytes())
    return image.convert(mode)


@pytest.mark.parametrize("n_px", [224, 336, 37])
@pytest.mark.parametrize("file", FILES)
def test_photographs(transform, file, n_px):
    with Image.open(photographs() / file) as image:
        expected = transform(n_px)(image)
    result = Preprocess(n_px)(photographs() / file)
    assert result.dtype == torch.float32 and result.shape == (3, n_px, n_px) and result.is_contiguous()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("size", [(451, 300), (201, 302), (64, 64), (40, 90), (7, 5), (1, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_modes(transform, cat, mode, size):
    image = as_mode(cat.resize(size), mode)
    before = image.tobytes()
    result = Preprocess(64)(image)
    assert torch.equal(result, transform(64)(image))
    # not blank: the image really went through
    assert size == (1, 1) or mode == "PA" or result.std() > 0.1
    assert image.mode == mode and image.tobytes() == before


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000), (2000, 1), (1, 2000), (449, 448), (225, 226), (224, 224)])
def test_extreme_shapes(transform, cat, size):
    n_px = 16 if max(size) > 999 else 224
    image = cat.resize(size)
    assert torch.equal(Preprocess(n_px)(image), transform(n_px)(image))


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    n_px=st.integers(1, 48),
    mode=st.sampled_from([mode for mode in MODES if mode != "LAB"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_noise(transform, size, n_px, mode, seed):
    # noise: every pixel and every rounding counts
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = as_mode(Image.fromarray(pixels), mode)
    assert torch.equal(Preprocess(n_px)(image), transform(n_px)(image))


def test_orientation_is_not_applied(transform, cat, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.save(tmp_path / "turned.jpg", exif=exif)
    cat.save(tmp_path / "plain.jpg")
    preprocess = Preprocess(64)
    result = preprocess(tmp_path / "turned.jpg")
    assert torch.equal(result, transform(64)(Image.open(tmp_path / "turned.jpg")))
    assert torch.equal(result, preprocess(tmp_path / "plain.jpg"))


def test_palette_with_transparency(transform, cat):
    buffer = io.BytesIO()
    image = cat.convert("P")
    image.save(buffer, "PNG", transparency=bytes(range(256)))
    image = Image.open(buffer)
    assert image.mode == "P" and "transparency" in image.info
    assert torch.equal(Preprocess(64)(image), transform(64)(image))


def test_mode_without_conversion(transform, cat):
    image = cat.convert("LA").convert("La")
    with pytest.raises(ValueError):
        transform(64)(image)
    with pytest.raises(ValueError, match=r"images\[1\]: Pillow cannot convert mode 'La' to RGB"):
        Preprocess(64)([cat, image])


# outputs


@pytest.mark.parametrize("n_px", [224, 31])
def test_uint8_normalises_to_the_same_bits(transform, cat, n_px):
    pixels = Preprocess(n_px, output="uint8")(cat)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, n_px, n_px) and pixels.is_contiguous()
    assert torch.equal(normalize(pixels), transform(n_px)(cat))
    assert torch.equal(normalize(pixels[None])[0], transform(n_px)(cat))


def test_every_pixel_value(transform):
    # 256 grey levels in a row of a 256 x 256 image, which needs no resize
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    expected = transform(256)(image)
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
    assert torch.equal(normalize(pixels), expected)
    assert torch.equal(Preprocess(256)(image), expected)
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (MEAN, STD))
    exact = (pixels.double() / 255 - mean) / std
    assert (normalize(pixels).double() - exact).abs().max() < 5e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(transform, cat, dtype):
    expected = transform(64)(cat).to(dtype)
    result = Preprocess(64, dtype=dtype)(cat)
    assert result.dtype == dtype and torch.equal(result, expected)
    pixels = Preprocess(64, output="uint8")([cat, cat])
    before = pixels.clone()
    assert torch.equal(normalize(pixels, dtype)[1], expected)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("output", ["float", "uint8"])
def test_batch_is_its_images(cat, tmp_path, output):
    preprocess = Preprocess(48, output=output)
    grey = tmp_path / "grey.png"
    cat.convert("L").save(grey)
    images = [cat, cat.rotate(90, expand=True), str(grey), grey, cat.convert("P")]
    batch = preprocess(images)
    assert batch.shape == (5, 3, 48, 48) and batch.is_contiguous()
    for row, image in zip(batch, images, strict=True):
        assert torch.equal(row, preprocess(image))
    assert torch.equal(preprocess(tuple(images)), batch)
    assert not torch.equal(batch[0], batch[1])
    assert preprocess([]).shape == (0, 3, 48, 48) and preprocess([]).dtype == batch.dtype


def test_result_is_on_the_cpu_whatever_the_default_device(cat):
    with torch.device("meta"):
        result = Preprocess(32)(cat)
    assert result.device.type == "cpu" and torch.equal(result, Preprocess(32)(cat))


def test_pickle_and_repr(cat):
    for preprocess in (Preprocess(32), Preprocess(32, output="uint8"), Preprocess(32, dtype=torch.float16)):
        copy = pickle.loads(pickle.dumps(preprocess))
        assert torch.equal(copy(cat), preprocess(cat)) and copy(cat).dtype == preprocess(cat).dtype
    assert repr(Preprocess(32)) == "Preprocess(n_px=32, output='float', dtype=torch.float32)"
    assert repr(Preprocess(32, output="uint8")) == "Preprocess(n_px=32, output='uint8')"


# errors


def test_bad_arguments(cat):
    with pytest.raises(ValueError, match="n_px must be at least 1, got 0"):
        Preprocess(0)
    for n_px in (224.0, "224", None, (224, 224)):
        with pytest.raises(TypeError, match="n_px must be an int"):
            Preprocess(n_px)
    with pytest.raises(ValueError, match='output must be "float" or "uint8", got \'int8\''):
        Preprocess(224, output="int8")
    for dtype in (torch.int32, "float16"):
        with pytest.raises(TypeError, match="dtype must be a floating torch.dtype"):
            Preprocess(224, dtype=dtype)
    with pytest.raises(TypeError, match=r"images\[1\] must be a PIL image or a path, not ndarray"):
        Preprocess(32)([cat, np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(TypeError, match="images must be a PIL image or a path, not NoneType"):
        Preprocess(32)(None)
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        Preprocess(32)(Image.new("RGB", (0, 5)))


def test_normalize_checks_its_input():
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match="images must be uint8, got torch.float32"):
        normalize(pixels.float())
    with pytest.raises(ValueError, match=r"got \(2, 4, 4, 3\)"):
        normalize(pixels.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"got \(4, 4\)"):
        normalize(pixels[0, 0])
    with pytest.raises(TypeError, match="dtype must be a floating"):
        normalize(pixels, torch.uint8)


def test_open_image_reads_everything(cat, tmp_path):
    cat.save(tmp_path / "cat.png")
    image = open_image(tmp_path / "cat.png")
    (tmp_path / "cat.png").unlink()
    assert image.mode == "RGB" and image.format == "PNG" and image.tobytes() == cat.tobytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tif", ".webp", ".bmp"])
def test_truncated_files(cat, tmp_path, suffix):
    path = tmp_path / f"whole{suffix}"
    cat.resize((200, 150)).save(path)
    content = path.read_bytes()
    assert open_image(path).size == (200, 150)
    cut = tmp_path / f"cut{suffix}"
    for length in (1, 10, 100, len(content) // 2):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"cut{suffix} is (truncated or damaged|not an image)"):
            open_image(cut)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty.jpg is empty \(0 bytes\)"):
        open_image(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match="text.jpg is not an image that Pillow can read"):
        Preprocess(32)([str(tmp_path / "text.jpg")])
    with pytest.raises(FileNotFoundError, match=r"missing.jpg"):
        open_image(tmp_path / "missing.jpg")
    with pytest.raises(OSError):
        open_image(tmp_path)


def test_decompression_bomb(cat, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    cat.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", cat.width * cat.height // 2 - 1)
    with pytest.raises(ValueError, match=rf"bomb.png is refused.*{cat.width * cat.height} pixels"):
        open_image(path)
