"""The commands of `recis-hybrid` that train: init, train and report.

Exit status: 0 if all is well, 1 if training or a file fails, 2 for a wrong call or configuration, 130 if interrupted
(Ctrl-C), 143 if terminated (SIGTERM): 128 + the signal's number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from recis_hybrid.pipelines.callback import CallbackError, rank
from recis_hybrid.pipelines.config import ConfigError, load_config
from recis_hybrid.pipelines.config_keys import describe_keys
from recis_hybrid.pipelines.config_run import stages_of, trainer_of
from recis_hybrid.pipelines.guard import NonFiniteLossError
from recis_hybrid.pipelines.interruption import Terminated
from recis_hybrid.pipelines.launch import joined
from recis_hybrid.pipelines.report import write_report
from recis_hybrid.pipelines.starter import write_starter
from recis_hybrid.saver import CheckpointError

COMMANDS = ("init", "train", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Of the command line; None takes the process's.

    Returns:
        The exit status.
    """
    args = _parse(arguments)
    try:
        status: int = args.run(args)
    except ConfigError as error:
        print(f"recis-hybrid: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("recis-hybrid: interrupted; `train --resume` goes on from the latest checkpoint", file=sys.stderr)
        return 130
    except Terminated as error:
        return int(error.code or 1)
    except (CheckpointError, CallbackError, NonFiniteLossError, OSError, ValueError, TypeError, KeyError) as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"recis-hybrid: {text}{notes}", file=sys.stderr)
        return 1
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse does not put positional arguments together that options stand between.
    stray = [each for each in rest if each.startswith("-") or "=" not in each or args.run is not _train]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("recis-hybrid", description="Trains models without a script.")
    commands = result.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="write a configuration to begin with, and a small log that it runs on")
    init.add_argument("folder", type=Path, nargs="?", default=Path("first"), help="where to (first)")
    init.set_defaults(run=_init)

    train = commands.add_parser(
        "train", help="train what a configuration says",
        description="Trains what a configuration says. The last line on stdout is JSON.",
        epilog=f"keys of a configuration, what they take, and (what they are if nothing is said):\n{describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    train.add_argument("config", type=Path, help="a YAML file, as `recis-hybrid init` writes it")
    train.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="other values, as train.epochs=5")
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint, if there is one")
    train.add_argument("--check", action="store_true", help="check the configuration and open the data, no more")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(run=_train)

    report = commands.add_parser("report", help="make one HTML page of the log of a run")
    report.add_argument("path", type=Path, metavar="RUN", help="folder with log.jsonl")
    report.add_argument("--out", type=Path, help="the page (RUN/report.html)")
    report.set_defaults(run=_report)
    return result


def _init(args: argparse.Namespace) -> int:
    config = write_starter(args.folder)
    print(f"{config}: look at it, then run\n    recis-hybrid train {config}")
    return 0


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    with joined(config.train.device) as device:
        trainer = trainer_of(replace(config, train=replace(config.train, device=device)), quiet=args.quiet)
        if args.check:
            print(f"{args.config}: sound")
            return 0
        assert trainer.saver is not None
        if not args.resume and (steps := trainer.saver.steps()):
            raise ConfigError(
                f"{config.run} has checkpoints of the steps {steps} already; go on from them by --resume, or name "
                f"another folder by run=FOLDER"
            )
        if rank() == 0:
            run = Path(config.run)
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
        figures = trainer.fit(stages_of(config), resume="latest" if args.resume else None)
        if rank() == 0:
            last = {"steps": trainer.steps_done, "samples": trainer.samples, "stopped": trainer.stopped}
            print(json.dumps({**last, **{f"{stage}/{k}": v for stage, of in figures.items() for k, v in of.items()}}))
    return 0


def _report(args: argparse.Namespace) -> int:
    print(write_report(args.path, args.out))
    return 0
