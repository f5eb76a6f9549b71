"""A training run on the disk: goes on where the last process was killed; has metrics, checkpoints, the final model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipfast.checkpoints import save
from clipfast.checkpoints.archive import read_file
from clipfast.commands import CommandError
from clipfast.training.checkpoint import checkpoint_path, latest_checkpoint, save_checkpoint
from clipfast.training.data import BadSample
from clipfast.training.metrics import BadSamplesFile, MetricsFile, draw_curves, progress
from clipfast.training.processes import Processes
from clipfast.training.trainer import Stopped, Trainer
from clipfast.words import counted

__all__ = ["Run"]

CHECKPOINTS, METRICS, BAD, CURVES, MODEL = "checkpoints", "metrics.jsonl", "bad_samples.jsonl", "curves.png", "model.pt"


class Run:
    """The folder `out` of one training.

    fixed:      settings that decide what is learned; a run goes on only with the same ones.
    rounding:   settings that only decide how numbers are rounded; a change is told.
    save_every: steps between checkpoints.   keep: checkpoints that stay.
    evaluate:   gives shares for the metrics, and what it could not read; after every eval_every epochs and at the end.
    """

    def __init__(
        self,
        out: Path,
        group: Processes,
        *,
        fixed: dict[str, Any],
        rounding: dict[str, Any],
        save_every: int,
        keep: int,
        evaluate: Callable[[], tuple[dict[str, float], list[BadSample]]] | None = None,
        eval_every: int = 1,
        written: list[Path] | None = None,
    ):
        self.out = out
        self._group = group
        # as they are once they have been in a checkpoint: tuples are lists
        self._fixed, self._rounding = json.loads(json.dumps([fixed, rounding]))
        self._save_every = save_every
        self._keep = keep
        self._evaluate = evaluate
        self._eval_every = eval_every
        self._written = [] if written is None else written
        self._metrics = MetricsFile(out / METRICS)
        name = BAD if group.first else f"bad_samples-rank{group.rank}.jsonl"
        self._bad = BadSamplesFile(out / name)

    def resume(self, trainer: Trainer, *, must_be_new: bool = False) -> None:
        """Bring the trainer to the newest whole checkpoint, and the metrics back to its step.

        Raises: CommandError if the run there is another one, or must_be_new and there is one.
        """
        path, state = None, None
        if self._group.first:
            if must_be_new and (self._metrics.path.exists() or any((self.out / CHECKPOINTS).glob("step-*"))):
                raise CommandError(f"{self.out} has a run already: give another --out, or leave out --resume never")
            path, state = latest_checkpoint(self.out / CHECKPOINTS)
        path = self._group.from_first(path)
        if path is not None:
            state = state or read_file(path).values
            self._compare(state)
            trainer.load_state(state)
            self._say(f"goes on after step {trainer.step} of {trainer.recipe.steps} ({path})")
        if self._group.first:
            self._metrics.cut_back(trainer.step)

    def _compare(self, state: dict[str, Any]) -> None:
        old, new = state["fixed"], self._fixed
        changed = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new[key]]
        if changed:
            what = "; ".join(changed)
            raise CommandError(f"{self.out} holds another run: {what}. Give another --out, or the same settings")
        old, new = state["rounding"], self._rounding
        changed = [f"{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]]
        if changed:
            self._say(f"{'; '.join(changed)}: the same batches follow, with other rounding")

    def train(self, trainer: Trainer) -> None:
        """All steps that are left; then the model in OpenAI's layout and a picture of the curves.

        Raises: Stopped, with a checkpoint of the last step written; what `Trainer.run` raises.
        """
        steps = trainer.recipe.steps
        try:
            with progress(steps, trainer.step, bar=self._group.first) as bar:

                def after_step(metrics: dict[str, Any], bad: list[BadSample]) -> None:
                    self._bad.add(bad, bar.clear)
                    if self._group.first:
                        self._metrics.write(metrics)
                        bar.show(
                            metrics["loss"], lr=f"{metrics['lr']:.1e}", rate=f"{metrics['samples_per_second']:.0f}/s"
                        )
                        if self._due(trainer):
                            bar.clear()
                            self._write_evaluation(metrics)
                    if trainer.step % self._save_every == 0 or trainer.step == steps:
                        self._checkpoint(trainer)

                trainer.run(after_step)
        except Stopped:
            self._checkpoint(trainer)
            raise
        if self._group.first:
            self._finish(trainer)

    def _due(self, trainer: Trainer) -> bool:
        if self._evaluate is None:
            return False
        span = self._eval_every * trainer.order.steps_per_epoch
        return trainer.step % span == 0 or trainer.step == trainer.recipe.steps

    def _write_evaluation(self, metrics: dict[str, Any]) -> None:
        figures, bad = self._evaluate()
        self._bad.add(bad, lambda: None)
        self._metrics.write({"step": metrics["step"], "epoch": metrics["epoch"], **figures})
        shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items())
        print(f"   epoch {metrics['epoch']}: {shown}", flush=True)

    def _checkpoint(self, trainer: Trainer) -> None:
        state = {**trainer.state(), "fixed": self._fixed, "rounding": self._rounding}
        path = checkpoint_path(self.out / CHECKPOINTS, trainer.step)
        if self._group.first:
            # first what the checkpoint stands behind
            self._metrics.flush()
            save_checkpoint(path, state, self._keep)
        self._written[:] = [path]

    def _finish(self, trainer: Trainer) -> None:
        save(trainer.model, self.out / MODEL)
        self._written.append(self.out / MODEL)
        lines = self._metrics.read()
        drawn = draw_curves(lines, self.out / CURVES)
        losses = [line["loss"] for line in lines if "loss" in line]
        loss = f"loss {losses[-1]:.3f} after " if losses else ""
        print(f"Model: {self.out / MODEL}, in openai/CLIP's layout; {loss}{counted(trainer.step, 'step')}")
        print(f"Curves: {self.out / CURVES}" if drawn else "Curves: not drawn, matplotlib is not installed")
        if len(self._bad):
            print(f"Skipped: {counted(len(self._bad), 'sample')}, named in {self.out / BAD}")

    def _say(self, text: str) -> None:
        if self._group.first:
            print(f"   {text}", flush=True)
