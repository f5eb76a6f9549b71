"""One invocation of `clipfast bench`: groups in turn, each row written as soon as it is known."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast import roofline
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import (
    ceilings,
    compare,
    contest,
    environment,
    harness,
    house,
    output,
    peers,
    plan,
    tables,
    training,
    workload,
)
from clipfast.bench.budget import Budget
from clipfast.bench.exact import Exact
from clipfast.bench.harness import Row, significant
from clipfast.bench.plan import Group
from clipfast.files import check_folder, write_bytes
from clipfast.words import counted

COLUMNS = (
    *(*environment.ENVIRONMENT, "device", "mhz", "model", "tower", "dtype", "batch", "captions", "mean_length"),
    *("contestant", "version", "status", *harness.TIMES, *harness.TAIL, "prepare_s", "samples_per_s"),
    *("vs_openai", "vs_transformers", "gflop_per_sample", "gflops", "ceiling_gflops", "ceiling_by", "share_of_ceiling"),
    *("floor_s", "of_floor", "cos_gap_p99", "rel_rms", "rms_vs_openai", "rel_max", "warning", "note", "seconds"),
)
START_COLUMNS = (
    *(*environment.ENVIRONMENT, "device", "model", "dtype", "contestant", "status", "import_s", "build_s"),
    *("first_image_s", "second_image_s", "first_text_s", "second_text_s", "base_bytes", "peak_bytes", "note"),
)
# kept of the time for tables, plots and what a prediction is wrong by
RESERVE = 0.015
# the share of it in which contestants' starts are measured, as many as fit
START = 0.1
# of the group's part of the time, what timing it may take: the rest is for checks and for slower groups
SHARE = 0.12


class Run:
    """Its options, what is known so far, and where it goes."""

    def __init__(self, options: argparse.Namespace, written: list[Path] | None = None):
        self.options = options
        self.device: torch.device = options.device
        self.written = [] if written is None else written
        self.rows: list[Row] = []
        self.clocks: list[Row] = []
        self.start_rows: list[Row] = []
        self.ceilings = ceilings.Ceilings({}, {}, {})
        known = peers.known()
        self.peers = [known[name] for name in options.peers]
        self.missing: dict[str, str] = {}  # peer -> why, in this model and dtype
        limit = 60 * options.minutes if options.minutes else float("inf")
        self.budget = Budget(limit * (1 - RESERVE))
        self.bar = output.Bar(self.budget.left() if options.minutes else 0.0)
        self.facts = environment.environment()
        self.facts["device"] = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        environment.warn_if_busy(self.facts)
        environment.warn_if_emulated(self.device, options.dtypes)
        self.groups = [
            Group(model, dtype, tower, batch, str(options.captions) if tower != "image" else "")
            for model in options.models
            for dtype in options.dtypes
            for tower in options.towers
            for batch in options.batch
        ]
        apart = house.apart(self.device)
        self.costs = plan.Costs(self.ceilings.products, ARCHITECTURES, plan.PROCESS if apart else 0.0)
        self.house = house.House(apart)
        self.exact = Exact(self.costs, self.groups, options.captions)
        self.path = self._open()

    def _open(self) -> Path:
        """The CSV, empty: a folder that cannot be written to must fail now, not after the measurements."""
        # many kinds of CPU are called "AMD EPYC"
        kind = environment.slug(self.facts["device"]) if self.device.type == "cuda" else self.facts["cpu_kind"]
        stem = self.options.name or f"{kind}-{self.facts['date']}"
        check_folder(self.options.out)
        path = environment.free_name(self.options.out, stem)
        output.write_csv(path, COLUMNS, [])
        self.written.append(path)
        return path

    # -----------------------------------------------------------------------------------------------------------------

    def __call__(self) -> int:
        """Returns the exit status: 0, 1 if ours was wrong, or 130 after Ctrl-C."""
        status = 0
        try:
            self._begin()
            for model in self.options.models:
                self.bar.say(f"{model}: weights")
                self.weights = self.house.weights(workload.random_weights(ARCHITECTURES[model]), self.device)
                for dtype in self.options.dtypes:
                    self._model(model, dtype)
                    self.house.forget()
                    gc.collect()
        except KeyboardInterrupt:
            self.bar.clear()
            print("\ninterrupted: what is above is all that was measured")
            status = 130
        finally:
            self.house.close()
        self._save()
        if not self.options.no_plots:
            self._plots()
        print(f"\nresults: {', '.join(str(path) for path in self.written)}")
        ours = [row["status"] for row in self.rows if row["contestant"] in (peers.OURS, peers.PREPACKED)]
        return status or int("WRONG" in ours or "failed" in ours)

    def _begin(self) -> None:
        facts = self.facts
        where = facts["device"] if self.device.type == "cuda" else f"{facts['cpu']} ({facts['capability']})"
        print(f"{where}, {counted(facts['threads'], 'thread')}; torch {facts['torch']}; load {facts['load']}")
        print(f"clipfast {facts['clipfast']} {facts['commit']}".rstrip())
        self.bar.say("ceilings: reading, copying and multiplying")
        self.clocks.append({"at": "start", **environment.clock(self.device)})
        dtypes = dict.fromkeys(("float32", *self.options.dtypes))
        self.ceilings = ceilings.measure(self.device, dtypes, quick=self.options.quick)
        self.costs.ceilings = self.ceilings.products
        self.bar.clear()
        print(tables.ceilings(self.ceilings))
        print(tables.LEGEND)
        if not self.options.no_start:
            self._start()

    def _start(self) -> None:
        """Import, first call and peak memory of the first model, each contestant in a process of its own."""
        from clipfast.bench import start

        model, dtype = self.options.models[0], self.options.dtypes[0]
        spent = self.budget.part(self.budget.left())
        for peer in self.peers:
            if peer.name not in (peers.OURS, *start.MODULES) or dtype not in peer.dtypes:
                continue
            if spent.spent() + start.SECONDS > START * self.budget.left():
                break
            self.bar.say(f"{peer.name}: import, first call and memory, in a process of its own")
            row = start.measure(peer.name, model, dtype, self.device, self.options.captions)
            self.start_rows.append({**self.facts, "model": model, "dtype": dtype, "contestant": peer.name, **row})
        self.bar.clear()
        if self.start_rows:
            path = self.path.with_name(f"{self.path.stem}-start.csv")
            output.write_csv(path, START_COLUMNS, self.start_rows)
            self.written.append(path)
        tables.print_start(self.start_rows)

    def _left(self, group: Group) -> list[Group]:
        return self.groups[self.groups.index(group) :]

    def _chosen(self, group: Group) -> tuple[list[str], plan.Calls]:
        """Who takes part in this group by the plan made now, and how often."""
        options, rest = self.options, self._left(group)
        named = [peer for peer in self.peers if peer.name not in self.missing]
        rounds = plan.Rounds(options.rounds, options.tail, SHARE * self.budget.left() / len(rest))
        self.rounds = rounds
        begun = {g.model for g in self.groups if g not in rest} | {group.model}
        overhead = sum(self.costs.start(model) for model in {g.model for g in rest} - begun)
        overhead += self.exact.seconds(rest)
        seconds = self.budget.left() - overhead
        chosen = plan.choose(rest, named, self.costs, rounds, seconds)
        able = [peer for peer in named if peer.name in chosen[group]]
        predicted = plan.seconds(chosen, named, self.costs, rounds)
        self.bar.plan(max(0.0, min(self.budget.left(), predicted + overhead)))
        return chosen[group], plan.calls_of(group, able, self.costs, rounds)

    # -----------------------------------------------------------------------------------------------------------------

    def _model(self, model: str, dtype: str) -> None:
        """Every group of one model in one dtype. The contestants' models live no longer than this call."""
        spec = peers.Spec(self.weights, ARCHITECTURES[model], harness.DTYPES[dtype], self.device)
        self.missing = {peer.name: f"no {dtype}" for peer in self.peers if dtype not in peer.dtypes}
        for group in self.groups:
            if (group.model, group.dtype) == (model, dtype):
                self._group(group, spec)

    def _group(self, group: Group, spec: peers.Spec) -> None:
        """Build, check, time, print and write one group; what was measured is kept when somebody interrupts."""
        names, calls = self._chosen(group)
        rows: dict[str, Row] = {}
        text = None
        short = contest.too_large(group, self.device)
        try:
            if names and not short:
                self.bar.say(group.title())
                data = workload.inputs(spec.architecture, group.batch, self.options.captions)
                text = data["text"]
                batch = peers.Batch(*(data[name].to(self.device) for name in ("image", "text")))
                where = training if group.tower == "train" else compare
                where.compare(self, group, spec, batch, names, calls, rows)
        except (MemoryError, RuntimeError) as error:  # the inputs themselves do not fit
            rows |= {name: contest.failure(error) for name in names if name not in rows}
        finally:
            skipped = {"status": "skipped", "note": "out of time; more with --minutes"}
            for peer in self.peers:
                if short and peer.name not in self.missing:
                    rows[peer.name] = {"status": "out of memory", "note": short}
                elif peer.name not in names and peer.name not in self.missing:
                    rows.setdefault(peer.name, skipped)
            self._report(group, spec.architecture, rows, text)
        self.house.forget(keep=lambda seat: seat.alive)

    # -----------------------------------------------------------------------------------------------------------------

    def _report(self, group: Group, sizes: Mapping[str, Any], rows: dict[str, Row], text: Tensor | None) -> None:
        """Add rates to the rows, then write the CSV and print the table."""
        mean = None if text is None else significant((text.argmax(dim=-1) + 1).double().mean().item())
        if text is not None:
            self._add_rates(group, sizes, rows, (text.argmax(dim=-1) + 1).tolist())
        shared = {**self.facts, **{n: getattr(group, n) for n in ("model", "tower", "dtype", "batch")}}
        shared["mhz"] = environment.mhz(self.device)
        if group.tower != "image":
            shared |= {"captions": group.captions, "mean_length": "" if mean is None else mean}
        self.clocks.append({"at": group.title(), **environment.clock(self.device)})
        self.rows += [{**shared, "contestant": name, **row} for name, row in rows.items()]
        self.rows += [
            {**shared, "contestant": name, "status": "missing", "note": why} for name, why in self.missing.items()
        ]
        output.write_csv(self.path, COLUMNS, self.rows)
        self.bar.clear()
        tables.print_group(group.title(mean if group.tower != "image" else None), rows, self.missing)

    def _add_rates(self, group: Group, sizes: Mapping[str, Any], rows: dict[str, Row], lengths: list[int]) -> None:
        parameters = sum(w.numel() for w in self.weights.values()) if group.tower == "train" else 0
        itemsize = harness.DTYPES[group.dtype].itemsize
        works = roofline.works_of(sizes, group.tower, lengths, itemsize, parameters=parameters)
        tables.add_rates(rows, group, roofline.dense_flops(sizes, group.tower, group.batch), works, self.ceilings)

    def _save(self) -> None:
        """The CSV again, and JSON with the environment beside it."""
        output.write_csv(self.path, COLUMNS, self.rows)
        options = {
            name: value if isinstance(value, int | float | bool | list) else str(value)
            for name, value in vars(self.options).items()
            if name not in ("out", "parser", "command", "name") and value is not None
        }
        whole = {
            "options": options,
            "environment": self.facts,
            "peers": {peer.name: peers.version(peer) for peer in self.peers},
            "ceilings": {name: significant(value) for name, value in self.ceilings.rates.items()},
            "ceilings_by": self.ceilings.by,
            "ceilings_of_one_thread": {name: significant(value) for name, value in self.ceilings.single.items()},
            "cache_bytes": self.ceilings.cached,
            "clocks": self.clocks,
            "start": self.start_rows,
            "rows": self.rows,
        }
        path = self.path.with_suffix(".json")
        write_bytes(path, (json.dumps(whole, indent=1) + "\n").encode())
        self.written.append(path)

    def _plots(self) -> None:
        from clipfast.bench import plots

        try:
            self.written += plots.draw(self.rows, self.ceilings.rates, self.ceilings.by, self.path.with_suffix(""))
        except ImportError as error:
            print(f"no pictures: {error}", file=sys.stderr)
