"""FSDP2: two processes that hold half of each parameter get the gradients of one that holds all."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import clipfast

from .clips import VIT, make_images, make_texts, randomise, weighted

WORLD = 2


def _compare(rank: int, store: str, blocks: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        mesh = dist.init_device_mesh("cpu", (WORLD,))
        plain = randomise(clipfast.CLIP(*VIT))
        sharded = copy.deepcopy(plain)
        for block in (*sharded.transformer.resblocks, *sharded.visual.transformer.resblocks) if blocks else ():
            fully_shard(block, mesh=mesh)
        # FSDP2 shards no scalar
        fully_shard(sharded, mesh=mesh, ignored_params={sharded.logit_scale})
        part = slice(4 * rank, 4 * rank + 4)
        images, texts = make_images(VIT, 8)[part], make_texts(VIT, 8)[part]
        for model in (plain, sharded):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
                weighted(*model(images, texts)).backward()
        for (name, ours), (_, theirs) in zip(sharded.named_parameters(), plain.named_parameters(), strict=True):
            if name == "logit_scale":
                continue
            dist.all_reduce(theirs.grad)
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad / WORLD, rtol=1e-4, atol=1e-5, msg=name)
            assert len(ours.to_local()) < len(theirs)
    finally:
        dist.destroy_process_group()
    # FSDP2's caches keep the group and its threads, under which an interpreter that is cleared away may abort
    os._exit(0)


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "each block"])
def test_gradients_of_a_sharded_model(blocks, tmp_path):
    mp.spawn(_compare, (str(tmp_path / "store"), blocks), nprocs=WORLD)
