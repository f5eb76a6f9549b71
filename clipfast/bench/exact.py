"""The float64 answer that a group is checked against: few samples, and each image once."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.bench import workload
from clipfast.bench.contest import Truth
from clipfast.bench.peers import Batch, Spec
from clipfast.bench.plan import Costs, Group

# of float64 for one group
SECONDS = 2.0


class Exact:
    """Answers, kept: images are the same in a batch of any size."""

    def __init__(self, costs: Costs):
        self._costs = costs
        self._images: dict[tuple[str, str, int], Tensor] = {}

    def truth(self, group: Group, spec: Spec, batch: Batch) -> Truth:
        """Of as many samples as take some seconds, 2 at the least, spread over the batch."""
        most = SECONDS / self._costs.exact(group, 1)
        chosen = workload.checked_samples(group.batch, int(min(workload.CHECKED, max(2, most))))
        width = spec.architecture["embed_dim"]
        text = batch.text[chosen.to(spec.device)]
        if group.tower == "text":
            return Truth(workload.exact("text", spec.weights, text, spec.dtype).cpu(), chosen, width)
        images = torch.cat([self._image(group, spec, batch, int(index)) for index in chosen])
        if group.tower == "image":
            return Truth(images, chosen, width)
        texts = workload.exact("text", spec.weights, text, spec.dtype).cpu()
        logits = workload.exact_logits(images, texts, spec.weights["logit_scale"].cpu())
        return Truth(logits, chosen, group.batch, chosen)

    def _image(self, group: Group, spec: Spec, batch: Batch, index: int) -> Tensor:
        key = (group.model, group.dtype, index)
        if key not in self._images:
            image = batch.images[index : index + 1]
            self._images[key] = workload.exact("image", spec.weights, image, spec.dtype).cpu()
        return self._images[key]
