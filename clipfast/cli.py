"""The command line: `clipfast demo | classify | encode | train | eval | bench | profile | doctor | models`.

Arguments here, the work elsewhere.

Exit status: 0 done, 1 something failed (named on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

DEBUG = "CLIPFAST_DEBUG"  # set to 1 it lets a failure show its traceback


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors are one line on stderr."""
    written: list[Path] = []
    try:
        args = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            status = _run(args, written)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse: 0 for --help and --version, 2 for wrong usage
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt as stop:
        why = f" ({stop})" if str(stop) else ""
        print(f"\nclipfast: interrupted{why}; written: {', '.join(map(str, written)) or 'nothing'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `clipfast models | head -1`: the reader has left. What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        print(f"clipfast: {_one_line(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, written: list[Path]) -> int:
    # imported when asked for: each command needs other libraries
    if args.command == "demo":
        from clipfast import demo

        return demo.run(args.out, steps=args.steps, quick=args.quick, device=args.device, written=written)
    if args.command == "bench":
        from clipfast.bench import command as bench_command

        return bench_command.run(args, written)
    if args.command == "profile":
        from clipfast.profiling import command as profile_command

        return profile_command.run(args, written)
    if args.command == "doctor":
        from clipfast import doctor

        print(doctor.report())
        return 0
    if args.command in ("train", "eval"):
        from clipfast.training import command as training_command

        return (training_command.train if args.command == "train" else training_command.evaluate)(args, written)
    from clipfast import commands

    if args.command == "models":
        return commands.models()
    source = commands.Source(args.model, args.device, args.dtype, args.activation, args.batch)
    if args.command == "classify":
        labels = args.labels or commands.read_lines(args.labels_file)
        return commands.classify(args.images, source, labels, template=args.template, top=args.top, as_json=args.json)
    if not args.images and args.text is None:
        args.parser.error("give images, --text, or both")
    return commands.encode(
        args.images,
        source,
        args.out,
        text=args.text,
        normalize=args.normalize,
        truncate=args.truncate,
        written=written,
    )


def _parser() -> argparse.ArgumentParser:
    from clipfast import __version__
    from clipfast.bench import arguments as bench_arguments
    from clipfast.profiling import arguments as profile_arguments
    from clipfast.training.arguments import add_eval, add_train

    parser = argparse.ArgumentParser(prog="clipfast", description="CLIP on fused kernels.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"clipfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, check and time a small CLIP on this machine; downloads nothing")
    demo.add_argument("--out", type=Path, default=Path("clipfast-demo"), help="folder for the results (%(default)s)")
    demo.add_argument("--steps", type=_positive, help="training steps (1000, or 150 with --quick)")
    demo.add_argument("--quick", action="store_true", help="short training, a lower bar for accuracy, no timing")
    demo.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")

    classify = commands.add_parser("classify", help="probabilities of labels for images")
    classify.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    labels = classify.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", type=_labels, metavar="A,B,C", help="labels, separated by commas")
    labels.add_argument("--labels-file", type=Path, metavar="FILE", help="labels, one a line")
    classify.add_argument("--template", type=_template, default="a photo of a {}.", help='default: "%(default)s"')
    classify.add_argument("--top", type=_positive, default=5, metavar="K", help="labels to show (%(default)s)")
    classify.add_argument("--json", action="store_true", help="print JSON: every image, its labels or its error")
    _add_model(classify)

    encode = commands.add_parser("encode", help="embeddings of images and texts, to a .npz file")
    encode.add_argument("images", nargs="*", metavar="IMAGE", type=Path)
    encode.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    encode.add_argument("--text", type=Path, metavar="FILE", help="texts, one a line")
    encode.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of skipping them")
    encode.add_argument("--normalize", action="store_true", help="divide each embedding by its length")
    _add_model(encode)

    train = commands.add_parser("train", help="contrastive training or fine-tuning, on one process or under torchrun")
    add_train(train, _positive, _template)
    train.set_defaults(parser=train)

    evaluation = commands.add_parser("eval", help="zero-shot accuracy and image-text recall")
    add_eval(evaluation, _template)
    _add_model(evaluation)

    bench = commands.add_parser("bench", help="time whole models against every CLIP installed, checked against float64")
    bench_arguments.add(bench)
    profile_arguments.add(commands.add_parser("profile", help="where the time goes, per operator and per layer"))
    commands.add_parser("doctor", help="what is installed, and which backend runs each operator")
    commands.add_parser("models", help="names of the models that can be downloaded")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="ViT-B/32", help="a name from `clipfast models`, or a path (%(default)s)")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU")
    group.add_argument("--activation", choices=("quick_gelu", "gelu"), help="for checkpoints that do not say")
    group.add_argument("--batch", type=_positive, default=32, metavar="N", help="images or texts at once (%(default)s)")
    parser.set_defaults(parser=parser)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _labels(text: str) -> list[str]:
    labels = [label.strip() for label in text.split(",")]
    if not all(labels):
        raise argparse.ArgumentTypeError(f"expected labels separated by commas, got {text!r}")
    return labels


def _template(text: str) -> str:
    if text.count("{}") != 1:
        raise argparse.ArgumentTypeError(f"expected {{}} once, where the label goes, got {text!r}")
    return text


def _show_warning(message: Warning | str, *_: object) -> None:
    """One line, as errors are: where in the code it arose is nothing to whoever types a command."""
    print(f"clipfast: warning: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
