"""Whole models: clipfast against openai/CLIP, open_clip and transformers on the same weights and inputs.

    python -m benchmarks.models [--models ViT-B/32,RN50] [--batch 32] [--dtypes float32,bfloat16] [--towers image,text]
        [--captions 8-24] [--rounds 15] [--threads N] [--csv PATH] [--compile] [--quick]

Every contestant is compared with a float64 reference first; one that computes something else is reported and not timed.
The rest run in interleaved rounds in one process. Ctrl-C prints and writes what was measured so far. The columns are
explained in benchmarks/results/README.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness, linear, peers, workload
from benchmarks.harness import Row, significant

COLUMNS = (
    *(*harness.ENVIRONMENT, "model", "tower", "dtype", "batch", "captions", "mean_length", "contestant", "version"),
    *("status", *harness.TIMES, "samples_per_s", "vs_openai", "vs_transformers", "gflop_per_sample", "gflops"),
    *("ceiling_gflops", "share_of_ceiling", "cos_gap_p99", "rel_rms", "rms_vs_openai", "rel_max", "note", "seconds"),
)
HEADER = (
    *("contestant", "median ms", "p20", "p80", "samples/s", "x openai", "x transf.", "GFLOP/s", "of ceiling"),
    *("1-cos p99", "RMS error", "x openai's", "max error"),
)

LEGEND = """\
x openai, x transf.: times as fast as that contestant.  Errors: against float64; x openai's: its RMS error over theirs.
GFLOP/s: openai/CLIP's dense work over time, for everybody, so that who skips some of it can pass the ceiling."""


class Group(NamedTuple):
    """What is compared: everything that its rows share."""

    model: str
    tower: str
    dtype: str
    batch: int
    captions: workload.Captions

    def title(self, mean_length: float) -> str:
        captions = f", captions of {self.captions} tokens (mean {mean_length:g})" if self.tower == "text" else ""
        return f"{self.model} {self.tower}, {self.dtype}, batch {self.batch}{captions}"


def contest(
    calls: dict[str, harness.Function],
    exact: Tensor,
    batch: int,
    dtype: torch.dtype,
    rounds: int,
    progress: harness.Progress,
    rows: dict[str, Row],
) -> None:
    """Check every contestant, then time those that compute the right thing.

    rows: contestant -> status, errors and times; filled as they are found, so that an interrupted run keeps them.
    """
    chosen = workload.checked_samples(batch)
    accepted = {}
    for name, call in calls.items():
        try:
            output = call()
            if output.shape != (batch, exact.shape[1]) or not output.isfinite().all():
                rows[name] = {"status": "WRONG", "note": f"shape {list(output.shape)}, or NaN or infinity in it"}
                continue
            found = harness.errors(output[chosen], exact)
        except Exception as error:
            rows[name] = {"status": "failed", "note": harness.reason(error)}
            continue
        wrong = harness.verdict(found, dtype)
        rows[name] = {"status": "WRONG", "note": wrong, **found} if wrong else {"status": "untimed", **found}
        if not wrong:
            accepted[name] = call
    seconds: dict[str, list[float]] = {}
    try:
        for name, why in harness.time_rounds(accepted, rounds, seconds, tick=progress.tick).items():
            rows[name] |= {"status": "failed", "note": why}
    finally:
        for name, values in seconds.items():
            rows[name] |= {"status": "ok" if values else "untimed", **harness.times(values)}


def add_rates(rows: dict[str, Row], group: Group, flops: int, ceiling: float) -> None:
    """Throughput, ratios and share of the ceiling, from the medians and errors in the rows themselves."""
    first, second = rows.get(peers.OPENAI, {}), rows.get(peers.TRANSFORMERS[group.tower], {})
    for row in rows.values():
        row["gflop_per_sample"], row["ceiling_gflops"] = significant(flops / 1e9), significant(ceiling / 1e9)
        if first.get("rel_rms") and "rel_rms" in row:
            row["rms_vs_openai"] = significant(row["rel_rms"] / first["rel_rms"])
        if "median_s" not in row:
            continue
        row["samples_per_s"] = significant(group.batch / row["median_s"])
        row["gflops"] = significant(flops * group.batch / row["median_s"] / 1e9)
        row["share_of_ceiling"] = significant(flops * group.batch / row["median_s"] / ceiling)
        for column, other in (("vs_openai", first), ("vs_transformers", second)):
            if "median_s" in other:
                row[column] = significant(other["median_s"] / row["median_s"])


def line(name: str, row: Row) -> tuple[str, ...]:
    """A row of the printed table."""
    return (
        name + ("" if row["status"] == "ok" else f" ({row['status']})"),
        *(harness.cell(row, column, ".4g", 1e3) for column in ("median_s", "p20_s", "p80_s")),
        harness.cell(row, "samples_per_s", ".4g"),
        harness.cell(row, "vs_openai", ".2f"),
        harness.cell(row, "vs_transformers", ".2f"),
        harness.cell(row, "gflops", ".0f"),
        harness.cell(row, "share_of_ceiling", ".0%"),
        *(harness.cell(row, column, ".1e") for column in ("cos_gap_p99", "rel_rms")),
        harness.cell(row, "rms_vs_openai", ".2f"),
        harness.cell(row, "rel_max", ".1e"),
    )


class Run:
    """One invocation: its options, the rows so far, and where they go."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rows: list[Row] = []
        self.ceilings: dict[str, float] = {}
        groups = len(options.models) * len(options.dtypes) * len(options.towers)
        self.progress = harness.Progress(groups * options.rounds)
        self.facts = harness.environment()
        harness.warn_if_busy(self.facts)
        # a path that cannot be written must fail now, not after the measurements
        harness.write_csv(options.csv, COLUMNS, [])

    def _model(self, model: str, dtype: str) -> None:
        """Every tower of one model in one dtype. The contestants' models live no longer than this call."""
        options = self.options
        self.progress.say(f"{model} {dtype}: building models")
        architecture = workload.ARCHITECTURES[model]
        inputs = workload.inputs(architecture, options.batch, options.captions)
        weights = workload.random_weights(architecture)
        task = peers.Task(weights, architecture, harness.DTYPES[dtype], inputs["image"], inputs["text"])
        calls, missing = self._calls(task)
        for tower in options.towers:
            self._compare(Group(model, tower, dtype, options.batch, options.captions), task, calls[tower], missing)

    def _calls(self, task: peers.Task) -> tuple[dict[str, dict[str, harness.Function]], dict[str, str]]:
        calls: dict[str, dict[str, harness.Function]] = {tower: {} for tower in workload.TOWERS}
        self.versions: dict[str, str] = {}
        missing = {}
        for name, adapter in (peers.ADAPTERS | (peers.COMPILED if self.options.compile else {})).items():
            try:
                made = adapter(task)
            except peers.Missing as error:
                missing[name] = str(error)
                continue
            except Exception as error:
                missing[name] = f"not run: {harness.reason(error)}"
                continue
            for tower, theirs in made.items():
                calls[tower] |= theirs
                self.versions |= dict.fromkeys(theirs, peers.version(name))
        return calls, missing

    def _compare(
        self, group: Group, task: peers.Task, calls: dict[str, harness.Function], missing: dict[str, str]
    ) -> None:
        """Check, time, print and write one group; what was measured is kept when somebody interrupts."""
        self.progress.say(f"{group.model} {group.dtype} {group.tower}: float64 reference")
        data = task.images if group.tower == "image" else task.text
        exact = workload.exact(group.tower, task.weights, data, task.dtype)
        self.progress.say(f"{group.model} {group.dtype} {group.tower}")
        rows: dict[str, Row] = {}
        try:
            contest(calls, exact, group.batch, task.dtype, self.options.rounds, self.progress, rows)
        finally:
            self._report(group, task, rows, missing)

    def _report(self, group: Group, task: peers.Task, rows: dict[str, Row], missing: dict[str, str]) -> None:
        add_rates(rows, group, workload.flops(task.architecture, group.tower), self.ceilings[group.dtype])
        mean_length = significant((task.text.argmax(dim=-1) + 1).double().mean().item())
        shared = {**self.facts, "model": group.model, "tower": group.tower, "dtype": group.dtype, "batch": group.batch}
        if group.tower == "text":
            shared |= {"captions": str(group.captions), "mean_length": mean_length}
        for name, row in rows.items():
            self.rows.append({**shared, "contestant": name, "version": self.versions[name], **row})
        for name, why in missing.items():
            self.rows.append({**shared, "contestant": name, "status": "missing", "note": why})
        harness.write_csv(self.options.csv, COLUMNS, self.rows)
        notes = [f"{name}: {row['status']}: {row['note']}" for name, row in rows.items() if "note" in row]
        notes += [f"{name}: {why}" for name, why in missing.items()]
        self.progress.clear()
        lines = (line(name, row) for name, row in rows.items())
        harness.print_table(group.title(mean_length), HEADER, lines, notes)

    def __call__(self) -> int:
        """Returns the exit status: 0, or 130 after Ctrl-C."""
        facts, options = self.facts, self.options
        print(f"{facts['cpu']} ({facts['capability']}), {facts['threads']} threads; torch {facts['torch']}")
        print(f"clipfast {facts['clipfast']} {facts['commit']}".rstrip())
        print(LEGEND)
        try:
            for dtype in options.dtypes:
                self.progress.say(f"{dtype}: ceiling of a matrix product")
                self.ceilings[dtype] = linear.ceiling(harness.DTYPES[dtype], quick=options.quick)
                self.progress.clear()
                print(f"ceiling of a {dtype} matrix product: {self.ceilings[dtype] / 1e9:.0f} GFLOP/s")
            for number, (model, dtype) in enumerate(itertools.product(options.models, options.dtypes), 1):
                self._model(model, dtype)
                self.progress.skip_to(number * len(options.towers) * options.rounds)
                gc.collect()
        except KeyboardInterrupt:
            self.progress.clear()
            print("\ninterrupted: what is above is all that was measured")
            return 130
        return 0


def _several(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"type": _several, "metavar": "A,B"}
    parser.add_argument("--models", default="ViT-B/32", **several, help=f"of {', '.join(workload.ARCHITECTURES)}")
    parser.add_argument("--dtypes", default="float32,bfloat16", **several, help=f"of {', '.join(harness.DTYPES)}")
    parser.add_argument("--towers", default="image,text", **several, help="image, text or both")
    parser.add_argument("--batch", type=int, default=32, help="samples in a call (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contestant (default %(default)s)")
    parser.add_argument(
        "--captions",
        default="8-24",
        help="tokens in a caption, uniform in a range, or one length (default %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--csv", type=Path, help="write all rows here")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of openai/CLIP too")
    parser.add_argument("--quick", action="store_true", help="at most 4 samples, 3 rounds: does it run?")
    options = parser.parse_args(argv)
    known = {"models": workload.ARCHITECTURES, "dtypes": harness.DTYPES, "towers": workload.TOWERS}
    for option, values in known.items():
        for chosen in getattr(options, option):
            if chosen not in values:
                parser.error(f"--{option}: expected some of {', '.join(values)}, got {chosen!r}")
    try:
        options.captions = workload.Captions.parse(options.captions)
    except ValueError as error:
        parser.error(str(error))
    if options.quick:
        options.batch, options.rounds = min(options.batch, 4), min(options.rounds, 3)
    if min(options.batch, options.rounds) < 1:
        parser.error("--batch and --rounds must be at least 1")
    context = min(workload.ARCHITECTURES[model]["context_length"] for model in options.models)
    if options.captions.longest > context:
        parser.error(f"--captions: the model takes at most {context} tokens, got {options.captions}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    return Run(options)()


if __name__ == "__main__":
    raise SystemExit(main())
