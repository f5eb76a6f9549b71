"""The float64 answers that groups are checked against: few samples, and each only once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clipfast.bench import contest, workload
from clipfast.bench.contest import Truth
from clipfast.bench.peers import Spec
from clipfast.bench.plan import Costs, Group

# of float64 for one group
SECONDS = 2.0


class Exact:
    """Answers of all groups of a model, dtype and tower at once: its weights are gigabytes in float64."""

    def __init__(self, costs: Costs, groups: Sequence[Group], captions: workload.Captions | workload.CaptionFile):
        self._costs, self._groups, self._captions = costs, groups, captions
        self._known: dict[tuple[str, Group], Tensor] = {}  # (tower, group) -> [samples, E]

    def truth(self, group: Group, spec: Spec) -> Truth:
        """Of as many samples as take some seconds, 2 at the least, spread over the batch."""
        chosen, width = self._chosen(group), spec.architecture["embed_dim"]
        if group.tower in workload.TOWERS:
            return Truth(self._tower(group.tower, group, spec), chosen, width)
        images, texts = (self._tower(tower, group, spec) for tower in workload.TOWERS)
        logits = workload.exact_logits(images, texts, spec.weights["logit_scale"].cpu())
        return Truth(logits, chosen, group.batch, chosen)

    def seconds(self, groups: Iterable[Group]) -> float:
        """Predicted, of what these groups have no answer for yet. An image that several share counts for each."""
        missing = [group for group in groups if not any((tower, group) in self._known for tower in workload.TOWERS)]
        return sum(self._costs.exact(group, len(self._chosen(group))) for group in missing)

    def _chosen(self, group: Group) -> Tensor:
        most = SECONDS / self._costs.exact(group, 1)
        return workload.checked_samples(group.batch, int(min(workload.CHECKED, max(2, most))))

    def _tower(self, tower: str, group: Group, spec: Spec) -> Tensor:
        if (tower, group) not in self._known:
            same = [g for g in self._groups if g[:2] == group[:2] and g.tower in (tower, "both")]
            same = [g for g in same if g == group or not contest.too_large(g, spec.device)]
            data = [workload.inputs(spec.architecture, g.batch, self._captions)[tower][self._chosen(g)] for g in same]
            # images are the same in a batch of any size
            distinct, where = torch.unique(torch.cat(data), dim=0, return_inverse=True)
            found = workload.exact(tower, spec.weights, distinct.to(spec.device), spec.dtype).cpu()
            answers = found[where].split([len(rows) for rows in data])
            self._known |= {(tower, g): rows for g, rows in zip(same, answers, strict=True)}
        return self._known[tower, group]
