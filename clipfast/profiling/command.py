"""`clipfast profile`: build, profile, print, write."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import ceilings, environment, output, peers, tables, workload
from clipfast.bench.command import captions_of
from clipfast.bench.harness import Row, significant
from clipfast.bench.peers import ours
from clipfast.commands import CommandError, pick_device
from clipfast.files import check_file, check_folder, write_bytes
from clipfast.profiling import measure, steps

COLUMNS = (
    *(*environment.ENVIRONMENT, "device", "model", "what", "dtype", "batch", "kind", "part", "calls", "seconds"),
    *("share", "gb_per_s", "tflops", "floor_s", "of_floor", "bound"),
)
HEADER = ("", "calls", "ms", "share", "GB/s", "TFLOP/s", "floor ms", "of floor", "bound by")


def run(options: argparse.Namespace, written: list[Path] | None = None) -> int:
    """Returns the exit status 0.   written: each file is added once it is there.

    Raises: CommandError for what argparse cannot see; usage errors end in SystemExit.
    """
    _check(options)
    written = [] if written is None else written
    # the profiler's library reports its own start and end on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = {**environment.environment(), "device": "cpu"}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    environment.warn_if_busy(facts)
    environment.warn_if_emulated(device, [options.dtype])
    ceiling = ceilings.measure(device, dict.fromkeys(("float32", options.dtype)), quick=options.quick)
    print(tables.ceilings(ceiling))
    model, step, notes = _step(options, device)
    found = measure.passes(step, model, device, options.passes)
    rows = _report(found, ceiling, options, notes)
    if options.trace is not None:
        found.trace.export_chrome_trace(str(options.trace))
        written.append(options.trace)
    _write(found, rows, ceiling, facts, options, written)
    print(f"\nresults: {', '.join(map(str, written))}")
    return 0


def _check(options: argparse.Namespace) -> None:
    fail = options.parser.error
    if options.model not in ARCHITECTURES:
        fail(f"--model: expected one of {', '.join(ARCHITECTURES)}, got {options.model!r}")
    if min(options.batch, options.passes) < 1 or (options.threads is not None and options.threads < 1):
        fail("--batch, --passes and --threads must be at least 1")
    check_folder(options.out)
    if options.trace is not None:
        check_file(options.trace)


def _step(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Callable[[], Any], list[str]]:
    """The model, the pass, and what is to be said about it."""
    sizes, dtype = ARCHITECTURES[options.model], getattr(torch, options.dtype)
    training = options.what == "train"
    weights = workload.random_weights(sizes)
    model = ours.model(peers.Spec(weights, sizes, torch.float32 if training else dtype, device))
    # a replayed graph has no operators to name
    model.cuda_graphs = False
    if options.what == "files":
        try:
            paths = steps.image_files(options.images, options.batch)
        except ValueError as error:
            raise CommandError(f"--images: {error}") from error
        notes = [f"{len(set(paths))} different files; stages run one after another, file work on one thread"]
        return model, steps.files(model, paths, device), notes
    captions = captions_of(options.captions)
    try:
        data = workload.inputs(sizes, options.batch, captions)
    except ValueError as error:
        raise CommandError(f"--{error}") from error
    images, text = data["image"].to(device), data["text"].to(device)
    if training:
        step, loss = steps.train(model, images, text, dtype)
        return model, step, [f"loss: {loss}; AdamW, fused"]
    inputs = images.to(dtype) if options.what == "image" else text.int()
    return model, steps.tower(model, options.what, inputs), []


def _report(
    found: measure.Profile, ceiling: ceilings.Ceilings, options: argparse.Namespace, notes: list[str]
) -> dict[str, list[Row]]:
    """Print the tables; returns their rows by kind."""
    rows = {
        kind: [part.row(found.profiled, ceiling.rates, options.dtype) for part in parts]
        for kind, parts in (("operator", found.operators), ("layer", found.layers))
    }
    what = {"image": "encode_image", "text": "encode_text", "train": "a train step", "files": "files to embeddings"}
    title = f"{options.model} {what[options.what]}, {options.dtype}, batch {options.batch}"
    overhead = (
        f"a pass takes {found.plain * 1e3:.4g} ms, under the profiler {found.profiled * 1e3:.4g} ms: "
        f"overhead {found.overhead:+.1%}"
    )
    output.print_table(f"{title}, by operator (a pass)", HEADER, map(line, rows["operator"]), [overhead, *notes])
    if len(rows["layer"]) > 1:
        output.print_table(f"{title}, by layer (forward)", HEADER, map(line, rows["layer"]))
    print(f"\n{measure.bottleneck(rows['operator'], what[options.what])}")
    return rows


def line(row: Row) -> tuple[str, ...]:
    """A row of the printed table."""
    return (
        row["part"],
        str(row["calls"] or "-"),
        output.cell(row, "seconds", ".4g", 1e3),
        output.cell(row, "share", ".1%"),
        output.cell(row, "gb_per_s", ".3g"),
        output.cell(row, "tflops", ".3g"),
        output.cell(row, "floor_s", ".3g", 1e3),
        output.cell(row, "of_floor", ".0%"),
        row.get("bound", "-"),
    )


def _write(
    found: measure.Profile,
    rows: Mapping[str, list[Row]],
    ceiling: ceilings.Ceilings,
    facts: Row,
    options: argparse.Namespace,
    written: list[Path],
) -> None:
    stem = f"{environment.slug(options.model)}-{options.what}-{options.dtype}-b{options.batch}"
    shared = {**facts, "model": options.model, "what": options.what, "dtype": options.dtype, "batch": options.batch}
    path = options.out / f"{stem}.csv"
    output.write_csv(
        path, COLUMNS, [{**shared, "kind": kind, **row} for kind, several in rows.items() for row in several]
    )
    whole = {
        "environment": shared,
        "ceilings": {name: significant(value) for name, value in ceiling.rates.items()},
        "ceilings_by": ceiling.by,
        "pass_s": significant(found.plain),
        "profiled_pass_s": significant(found.profiled),
        "bottleneck": measure.bottleneck(rows["operator"], options.what),
        **rows,
    }
    write_bytes(path.with_suffix(".json"), (json.dumps(whole, indent=1) + "\n").encode())
    written += [path, path.with_suffix(".json")]
    try:
        from clipfast.profiling import picture

        written += picture.draw(found, rows["operator"], options.out / stem)
    except ImportError as error:
        print(f"no picture: {error}")
