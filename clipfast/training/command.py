"""What `clipfast train` and `clipfast eval` do with their arguments."""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfast.checkpoints import load
from clipfast.commands import CommandError, pick_device, read_lines
from clipfast.cpu import bfloat16_is_emulated
from clipfast.files import check_file, check_folder, write_bytes
from clipfast.model import CLIP, ModifiedResNet, architecture
from clipfast.training.architectures import make_model
from clipfast.training.data import BadSample, BatchOrder, PairDataset, RandomResizedCrop
from clipfast.training.evaluation import Evaluator, class_names, retrieval, zero_shot
from clipfast.training.lock import only_run_in
from clipfast.training.optimization import Recipe
from clipfast.training.processes import Processes, processes
from clipfast.training.run import Run
from clipfast.training.samples import TEMPLATES, DataSource, find_samples
from clipfast.training.trainer import Trainer, autocast_for
from clipfast.words import counted

__all__ = ["evaluate", "train"]


def train(args: argparse.Namespace, written: list[Path]) -> int:
    """Train, or go on training, as the arguments say; 0 when all steps are done.

    written: has the newest checkpoint, and at the end the model.
    Raises:  CommandError for what cannot work, before the first step where it can be seen; Stopped on Ctrl-C.
    """
    if args.model is None and args.init is None:
        args.parser.error("give --model, --init, or both")
    if args.crop_scale[0] > args.crop_scale[1]:
        args.parser.error(f"--crop-scale: {args.crop_scale[0]} is more than {args.crop_scale[1]}")
    with processes(args.device) as group:
        _train(args, group, written)
    return 0


def _train(args: argparse.Namespace, group: Processes, written: list[Path]) -> None:
    check_folder(args.out)
    with only_run_in(args.out, group):
        _train_in_folder(args, group, written)


def _train_in_folder(args: argparse.Namespace, group: Processes, written: list[Path]) -> None:
    trainer = _make_trainer(args, group)
    run = Run(
        args.out,
        group,
        fixed=_fixed(args, trainer),
        rounding=_rounding(args, group),
        save_every=args.save_every,
        keep=args.keep,
        evaluate=_make_evaluation(args, trainer),
        eval_every=args.eval_every,
        written=written,
    )
    run.resume(trainer, must_be_new=args.resume == "never")
    run.train(trainer)


def _make_trainer(args: argparse.Namespace, group: Processes) -> Trainer:
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)  # noqa: NPY002
    torch.manual_seed(args.seed)
    autocast_for(args.precision, group.device)
    samples = find_samples(_source(args, args.data))
    model = make_model(args.model, args.init, args.activation).to(group.device)
    # nothing is replayed while the weights change
    model.cuda_graphs = False
    model.set_grad_checkpointing(args.grad_checkpointing)
    batch, share = args.batch_size, args.batch_size // group.world
    order = BatchOrder(len(samples), batch, args.steps or 0, args.seed, rank=group.rank, world=group.world)
    order.steps = args.steps or args.epochs * order.steps_per_epoch
    if args.precision == "amp_bf16" and group.first and group.device.type == "cpu" and bfloat16_is_emulated():
        print(f"   {bfloat16_is_emulated()}")
    if isinstance(model.visual, ModifiedResNet) and group.first and (args.micro_batch or share) < batch:
        print("   BatchNorm sees the pairs that one process holds at once, not the whole batch")
    dataset = PairDataset(
        samples, RandomResizedCrop(model.visual.input_resolution, args.crop_scale), model.context_length, args.seed
    )
    trainer = Trainer(
        model,
        dataset,
        order,
        _recipe(args, model, order.steps),
        precision=args.precision,
        micro_batch=args.micro_batch,
        workers=args.workers,
        group=group,
    )
    if group.first:
        size = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"   {counted(len(samples), 'sample')}, {counted(order.steps, 'step')} of {counted(batch, 'pair')}, "
            f"{size:,} parameters, {group.device}"
        )
    return trainer


def _recipe(args: argparse.Namespace, model: CLIP, steps: int) -> Recipe:
    resnet = isinstance(model.visual, ModifiedResNet)
    return Recipe(
        steps=steps,
        lr=args.lr,
        warmup=min(10_000, steps // 10) if args.warmup is None else min(args.warmup, steps),
        beta1=args.beta1,
        beta2=args.beta2 if args.beta2 is not None else 0.999 if resnet else 0.98,
        eps=args.eps or (1e-8 if resnet else 1e-6),
        weight_decay=args.weight_decay,
        grad_clip=args.grad_clip,
    )


def _fixed(args: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    """What a run must have in common with the checkpoint that it goes on from."""
    model, samples = trainer.model, trainer.dataset.samples
    return {
        **{f"{name} of the model": value for name, value in architecture(model.state_dict()).items()},
        "activation": model.activation,
        "number of samples": len(samples),
        "fingerprint of the data": samples.fingerprint(),
        "templates": _templates(args),
        "--crop-scale": args.crop_scale,
        "--batch-size": args.batch_size,
        "--seed": args.seed,
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(trainer.recipe).items()},
    }


def _rounding(args: argparse.Namespace, group: Processes) -> dict[str, Any]:
    return {
        "number of processes": group.world,
        "threads": torch.get_num_threads(),
        "device": group.device.type,
        "--precision": args.precision,
        "--micro-batch": args.micro_batch,
        "torch": torch.__version__,
    }


def _templates(args: argparse.Namespace) -> list[str]:
    templates = [*(args.template or [])]
    if args.templates_file is not None:
        templates += read_lines(args.templates_file)
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong:
            raise CommandError(f"{args.templates_file}: expected {{}} once, where the class goes, got {wrong[0]!r}")
    return templates or [*TEMPLATES]


def _source(args: argparse.Namespace, paths: list[str]) -> DataSource:
    return DataSource(paths, args.format, args.image_column, args.caption_column, _templates(args))


def _make_evaluation(args: argparse.Namespace, trainer: Trainer):
    """A function that gives the shares among the figures and the bad samples, or None if none is asked for."""
    if not trainer.group.first:
        return None
    # at once: a path that is not there shows before the training; --format is of --data
    tasks = _tasks(args, "auto")
    if not tasks:
        return None

    def evaluation() -> tuple[dict[str, float], list[BadSample]]:
        model = trainer.model.eval()
        evaluator = Evaluator(model, args.batch_size, args.workers, trainer.autocast)
        figures = {name: value for task in tasks.values() for name, value in task(evaluator).items()}
        model.train()
        return {name: value for name, value in figures.items() if isinstance(value, float)}, evaluator.bad

    return evaluation


def _tasks(args: argparse.Namespace, format: str) -> dict[str, Any]:
    """Name -> function of an Evaluator, of the evaluations that are asked for."""
    tasks: dict[str, Any] = {}
    templates = _templates(args)
    if args.zero_shot:
        samples = find_samples(DataSource(args.zero_shot, format, args.image_column, args.caption_column))
        # raises now if a file of classes does not fit
        class_names(samples, args.classes)
        tasks["zero-shot"] = functools.partial(zero_shot, samples=samples, templates=templates, classes=args.classes)
    if args.retrieval:
        samples = find_samples(DataSource(args.retrieval, format, args.image_column, args.caption_column))
        tasks["retrieval"] = functools.partial(retrieval, samples=samples)
    return tasks


def evaluate(args: argparse.Namespace, written: list[Path]) -> int:
    """Print zero-shot accuracy and recall of a model, as a table or as JSON; 0.

    Raises: CommandError if nothing is asked for or nothing can be read; what `load` raises.
    """
    if args.out is not None:
        check_file(args.out)
    tasks = _tasks(args, args.format)
    if not tasks:
        args.parser.error("give --zero-shot, --retrieval, or both")
    model, _ = load(args.model, pick_device(args.device), dtype=args.dtype, activation=args.activation)
    evaluator = Evaluator(model, args.batch, args.workers)
    result: dict[str, Any] = {"model": args.model}
    for name, task in tasks.items():
        result[name] = task(evaluator)
    result["bad_samples"] = [sample._asdict() for sample in evaluator.bad]
    for sample in evaluator.bad:
        print(f"clipfast: skipped: {sample.reason}", file=sys.stderr)
    text = json.dumps(result, indent=2)
    if args.out is not None:
        write_bytes(args.out, text.encode())
        written.append(args.out)
    print(text if args.json else _table(result, tasks))
    return 0


def _table(result: dict[str, Any], tasks: dict[str, Any]) -> str:
    lines = []
    for name in tasks:
        for figure, value in result[name].items():
            shown = f"{100 * value:8.2f} %" if isinstance(value, float) else f"{value:8,}"
            lines.append(f"{figure.replace('_', ' '):<26}{shown}")
    if result["bad_samples"]:
        lines.append(f"{'skipped':<26}{len(result['bad_samples']):8,}")
    return "\n".join(lines)
