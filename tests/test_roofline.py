"""The counted work is PyTorch's own count, and the least work is less by what nobody reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipfast import reference, roofline
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload
from clipfast.roofline import Work

from . import peers

BATCH = 2


@pytest.fixture(scope="module")
def counted():
    """{(model, tower): operations} of openai/CLIP itself, on tensors without memory."""
    library, found = peers.openai_clip().model, {}
    for name, sizes in ARCHITECTURES.items():
        with torch.device("meta"):
            model = library.CLIP(**sizes).eval()
            images = torch.empty(BATCH, 3, *(sizes["image_resolution"],) * 2)
            text = torch.zeros(BATCH, sizes["context_length"], dtype=torch.long)
        towers = {
            "image": lambda m=model, x=images: m.encode_image(x),
            "text": lambda m=model, t=text: m.encode_text(t),
            "both": lambda m=model, x=images, t=text: _one_product(m, x, t),
        }
        # the counter has no formula for a CPU's fused attention
        with sdpa_kernel(SDPBackend.MATH):
            for tower, call in towers.items():
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    call()
                found[name, tower] = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                towers["both"]().sum().backward()
            found[name, "train"] = counter.get_total_flops()
    return found


def _one_product(model, images, text):
    rows = (F.normalize(each, dim=-1) for each in (model.encode_image(images), model.encode_text(text)))
    first, second = rows
    return model.logit_scale.exp() * first @ second.t()


@pytest.mark.parametrize("tower", ["image", "text", "both", "train"])
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_dense_operations_are_those_that_pytorch_counts(counted, model, tower):
    assert roofline.dense_flops(ARCHITECTURES[model], tower, BATCH) == counted[model, tower]


@pytest.mark.parametrize("tower", workload.TOWERS)
def test_dense_operations_are_those_of_the_reference(tower):
    sizes = ARCHITECTURES["ViT-B/32"] | {"vision_layers": 2, "transformer_layers": 2}
    weights = workload.random_weights(sizes)
    data = workload.inputs(sizes, 3, workload.Captions(8, 24))
    with FlopCounterMode(display=False) as counter:
        getattr(reference, f"encode_{tower}")(weights, data[tower])
    assert counter.get_total_flops() == roofline.dense_flops(sizes, tower, 3)


def test_less_work_takes_less_time():
    sizes = ARCHITECTURES["ViT-B/32"]
    rates = (8e14, 3e12)
    short, whole = ([16] * 256, [77] * 256)
    times = [roofline.seconds(roofline.text_tower(sizes, lengths, 2), *rates) for lengths in (short, whole)]
    assert 4 < times[1] / times[0] < 6
    dense, pooled = (roofline.total(roofline.image_tower(sizes, 256, 2, dense=d)) for d in (True, False))
    assert 0.91 < pooled.flops / dense.flops < 0.95
    assert roofline.total(roofline.image_tower(sizes, 256, 2, pixel_size=1)).bytes < pooled.bytes
    least = {tower: roofline.total(roofline.works_of(sizes, tower, short, 2)) for tower in ("image", "text", "both")}
    assert least["both"].flops == least["image"].flops + least["text"].flops + 2 * 256 * 256 * 512


def test_a_resnet_without_its_unread_rows_does_less():
    sizes = ARCHITECTURES["RN50"]
    dense, least = (roofline.total(roofline.image_tower(sizes, 4, 4, dense=d)) for d in (True, False))
    # the attention pool of 7 x 7 + 1 rows of 2048, 32 heads: every row against one, which folds keys and values away
    rows, width, embed_dim = 50, 2048, 1024
    every = 6 * rows * width**2 + 4 * rows**2 * width + 2 * rows * width * embed_dim
    one = 6 * width**2 + 4 * 32 * rows * width + 2 * width * embed_dim
    assert dense.flops - least.flops == 4 * (every - one) and least.bytes < dense.bytes


def test_operators():
    assert roofline.linear(10, 3, 4, 2, residual=True) == [Work(240, 2 * (40 + 12 + 3 + 30), 2 * 30, 2 * 15)]
    assert roofline.layer_norm(10, 4, 2) == [Work(0, 2 * 40 + 16, 2 * 40, 16)]
    assert roofline.layer_norm(10, 4, 2, residual=True) == [Work(0, 4 * 40 + 16, 4 * 40, 16)]
    assert roofline.attention([3, 2], 64, 2, causal=False) == [Work(4 * 13 * 64, 3 * 5 * 64 * 2, 5 * 64 * 2)]
    assert roofline.attention([3, 2], 64, 2, causal=True)[0].flops == 4 * (6 + 3) * 64
    assert roofline.logits(3, 5, 4, 2) == [Work(120, 2 * 32, 2 * 15)]
    assert roofline.patch_embed(2, 4, 2, 8, 1, 2)[0].flops == 2 * 2 * 4 * 12 * 8
    assert roofline.convolution(1, 4, 2, 3, 3, 2, stride=2) == [
        Work(2 * 16 * 3 * 2 * 9, 2 * (64 * 2 + 54), 2 * 48, 2 * 54)
    ]


def test_time_is_that_of_the_slower_of_the_two_ceilings_launch_by_launch():
    assert roofline.seconds([Work(100, 5, 5), Work(10, 60, 40)], 10, 10) == 20


def test_weights_are_read_at_a_rate_of_their_own():
    works = [Work(0, 60, 40, weights=50)]
    assert roofline.seconds(works, 10, 10, 25) == 5 + 2 and roofline.seconds(works, 10, 10) == 10


def test_a_cpu_waits_for_weights_that_no_cache_keeps_and_computes_meanwhile():
    works = [Work(100, 500, 900, weights=400), Work(50, 300, 0, weights=200), Work(0, 60, 40, updated=100)]
    # 600 bytes of weights and 100 of an optimiser; what passes between launches is in caches
    assert roofline.whole(works, 1e9, 10, 20) == 60 + 5
    assert roofline.whole(works, 1e9, 10, 20, cached=80) == 52 + 1
    assert roofline.whole(works, 1e9, 10, 20, cached=1000) == 150 / 1e9
    assert roofline.whole(works, 2, 10, 20) == 75


@pytest.mark.parametrize("model", ["ViT-B/32", "RN50"])
def test_weights_of_a_tower_are_those_of_its_matrices(model):
    """Each once, whatever the batch; embeddings, gains and biases of LayerNorm are left out."""
    sizes = ARCHITECTURES[model]
    parameters = {name: tensor for name, tensor in workload.random_weights(sizes).items() if tensor.is_floating_point()}
    for tower in workload.TOWERS:
        own = [w.numel() for n, w in parameters.items() if n.startswith("visual.") == (tower == "image")]
        if tower == "text":
            own.remove(parameters["token_embedding.weight"].numel())
        for batch in (1, 5):
            read = roofline.total(roofline.works_of(sizes, tower, [16] * batch, 4)).weights / 4
            assert 0.98 * sum(own) < read <= sum(own), tower


def test_backward_reads_and_writes_what_a_gradient_must():
    work = Work(100, 30, 7)
    assert roofline.backward(work) == Work(200, 37, 30)
    assert roofline.backward(work, inputs=False).flops == 100


def test_the_optimiser_moves_seven_numbers_a_parameter():
    sizes = ARCHITECTURES["ViT-B/32"]
    none, some = (roofline.total(roofline.train_step(sizes, [16] * 4, 2, parameters=n)) for n in (0, 1000))
    assert some.bytes - none.bytes == some.updated == 28_000 and some.flops == none.flops and none.updated == 0
