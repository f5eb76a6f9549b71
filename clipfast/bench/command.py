"""`clipfast bench`: its options made sense of, and the run."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import arguments, peers, workload
from clipfast.bench.house import ended_properly
from clipfast.bench.run import Run
from clipfast.commands import CommandError, pick_device


def run(options: argparse.Namespace, written: list[Path] | None = None) -> int:
    """Returns the exit status: 0, 1 if clipfast computed something wrong, 130 after Ctrl-C.

    written: each file is added once it is there.
    Raises:  CommandError for what argparse cannot see; usage errors end in SystemExit.
    """
    if options.peers == ["list"]:
        for name, peer in peers.known().items():
            print(f"{name}: {peers.version(peer) or 'not installed'} ({', '.join(peer.devices)})")
        return 0
    resolve(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with ended_properly():
        return Run(options, written)()


def resolve(options: argparse.Namespace) -> None:
    """Names become what they stand for; what is unknown is named, with what is known."""
    fail = options.parser.error
    options.device = pick_device(options.device)
    everybody = peers.known()
    known = {
        "models": ARCHITECTURES,
        "dtypes": arguments.DTYPES,
        "towers": arguments.TOWERS,
        "peers": everybody,
    }
    options.peers = options.peers or peers.defaults(options.device)
    for option, names in known.items():
        for chosen in getattr(options, option):
            if chosen not in names:
                fail(f"--{option}: expected some of {', '.join(names)}, got {chosen!r}")
    if options.quick:
        options.rounds = options.tail = min(options.rounds, 3)
    if (
        min(options.rounds, options.tail) < 1
        or (options.threads is not None and options.threads < 1)
        or options.minutes < 0
    ):
        fail("--rounds, --tail and --threads must be at least 1, --minutes at least 0")
    options.captions = captions_of(options.captions)
    for model in options.models:
        try:
            options.captions.ids(ARCHITECTURES[model], 1, 0)
        except ValueError as error:
            fail(f"--captions: {error}")


def captions_of(text: str) -> workload.Captions | workload.CaptionFile:
    """Lengths like "8-24" or "77"; anything else is the name of a file."""
    if text.replace("-", "", 1).isdecimal():
        try:
            return workload.Captions.parse(text)
        except ValueError as error:
            raise CommandError(f"--captions: {error}") from error
    try:
        return workload.CaptionFile(Path(text))
    except ValueError as error:
        raise CommandError(f"--{error}; give a file, or lengths like 8-24 or 77") from error
