"""The commands of ``recis-hybrid`` that train and score: init, train, evaluate, predict, report and plan.

Exit status: 0 for success, 1 if training or a file fails, 2 for invalid arguments or configurations, 128 plus the
signal number if interrupted: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recis_hybrid import distributed
from recis_hybrid.app.build import read_options, stages_of, trainer_of
from recis_hybrid.app.check import check
from recis_hybrid.app.config import Config, ConfigError, load_config
from recis_hybrid.app.config.keys import describe_keys
from recis_hybrid.app.launch import joined
from recis_hybrid.app.loaded_run import load_run, run_and_step
from recis_hybrid.app.plan import plan_parser, run_plan
from recis_hybrid.app.report import write_report
from recis_hybrid.app.resume import (
    NAME,
    Changes,
    allowed_changes,
    changes_text,
    recorded_config,
    refuse_folder,
)
from recis_hybrid.app.template import write_starter
from recis_hybrid.pipelines.callback import CallbackError
from recis_hybrid.pipelines.interruption import Terminated
from recis_hybrid.pipelines.predict import check_output, write_predictions
from recis_hybrid.pipelines.scores import ROWS_PER_FILE
from recis_hybrid.pipelines.steps.gradient_guard import NonFiniteGradientError
from recis_hybrid.pipelines.steps.loss_guard import NonFiniteLossError
from recis_hybrid.pipelines.trainer import Trainer
from recis_hybrid.saver import CheckpointError, Saver
from recis_hybrid.saver.cli import Parser
from recis_hybrid.saver.storage.resolve import storage_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments. None uses ``sys.argv``.

    Returns:
        The exit status.
    """
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    if not command_line or command_line[0] not in _COMMANDS:
        print(
            f"recis-hybrid: the first argument must be one of {', '.join(_COMMANDS)}, got {command_line[:1]}",
            file=sys.stderr,
        )
        sys.exit(2)
    name, run = command_line[0], _COMMANDS[command_line[0]][1]
    args = _COMMANDS[name][0]().parse(command_line[1:])
    try:
        return run(args)
    except ConfigError as error:
        print(f"recis-hybrid: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"recis-hybrid: interrupted{_resume_hint(name)}", file=sys.stderr)
        return 130
    except Terminated as error:
        print(f"recis-hybrid: terminated{_resume_hint(name)}", file=sys.stderr)
        return int(error.code or 1)
    except (
        CheckpointError,
        CallbackError,
        NonFiniteGradientError,
        NonFiniteLossError,
        ImportError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        print(f"recis-hybrid: {text}{_key_of_spec(text)}{notes}", file=sys.stderr)
        return 1


def _resume_hint(command: str) -> str:
    return "; `train --resume` continues from the latest checkpoint" if command == "train" else ""


def _key_of_spec(text: str) -> str:
    """Return a hint with the configuration key for the Python argument in a message about a column."""
    match = re.search(r"column '(.*?)' .*; use \w+\((?:.*, )?(default|null_as_empty)=", text)
    return "" if match is None else f"; in a configuration it is data.columns.{match[1]}.{match[2]}"


def _json(figures: dict[str, Any]) -> str:
    """Return figures as JSON, with null for NaN and infinities."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
    return json.dumps(finite, allow_nan=False)


def _init_parser() -> Parser:
    parser = Parser("init", "write a starter configuration and a small click log to run it on")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("first"), help="folder to write to (first)")
    return parser


def _init(args: argparse.Namespace) -> int:
    config = write_starter(args.folder)
    print(f"{config}: edit it, then run\n    recis-hybrid train {config}")
    return 0


class _TrainParser(Parser):
    def error(self, message: str) -> Any:
        """Explain how to set keys if one was passed as an option."""
        option = message.removeprefix("unrecognized arguments: ").split()[0].lstrip("-")
        keys = [line.split(":")[0].strip() for line in describe_keys().splitlines() if line[:3].strip()]
        names = {key.rpartition(".")[2]: key for key in keys} | {key: key for key in keys}
        if message.startswith("unrecognized") and (key := names.get(option.partition("=")[0].replace("-", "_"))):
            message = f"{message}; set keys as {key}=VALUE"
        elif "required: config" in message:
            message += "; `recis-hybrid init` writes a starter configuration"
        super().error(message)


def _train_parser() -> Parser:
    parser = _TrainParser(
        "train",
        "train a model from a configuration; the last line on stdout is JSON",
        epilog=f"Paths in a configuration are relative to its folder, those in KEY=VALUE to the current one.\n\n"
        f"configuration keys, their types and (defaults):\n{describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a YAML file, for example from `recis-hybrid init`")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="set a key: train.epochs=5")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    parser.add_argument(
        "--check", action="store_true", help="check the configuration on a sample of the data, without training"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    refuse_folder(config.run, args.config)
    with joined(config.train.device) as device:
        here = replace(config, train=replace(config.train, device=device))
        steps = Saver(config.run).steps()
        changes = _changes(config, steps) if args.resume else {}
        if args.check:
            for line in check(here):
                _say(line)
            if distributed.rank() == 0:
                print(f"{args.config}: no problems found")
            return 0
        if steps and not args.resume:
            raise ConfigError(
                f"{config.run} has checkpoints of the steps {steps}; continue from them with --resume, or set "
                f"another folder with run=FOLDER"
            )
        trainer = trainer_of(here, quiet=args.quiet, changes=changes)
        figures = trainer.fit(stages_of(config), resume="latest" if args.resume else None)
        samples = int(distributed.sum_over_ranks(torch.tensor(trainer.samples)))
        if distributed.rank() == 0:
            if steps and steps[-1] == trainer.steps_done:
                _say(_finished(config, trainer))
            summary = {"steps": trainer.steps_done, "samples": samples, "stopped": trainer.stopped}
            print(_json({**summary, **{f"{stage}/{k}": v for stage, of in figures.items() for k, v in of.items()}}))
    return 0


def _changes(config: Config, steps: Sequence[int]) -> Changes:
    """Return and print the changes to a resumed run."""
    if not steps:
        _say(f"{config.run} has no checkpoint yet: training starts at step 0")
        return {}
    if not (storage_of(config.run).root / NAME).is_file():
        _say(f"{config.run} has no {NAME}: changes to its configuration are unknown")
        return {}
    try:
        recorded = recorded_config(config.run)
    except ConfigError as error:
        raise ConfigError(f"{error}; remove the file to continue without a comparison") from error
    changes = allowed_changes(recorded, config)
    if changes:
        _say(f"{config.run} continues from step {steps[-1]} with {changes_text(changes)}")
    return changes


def _finished(config: Config, trainer: Trainer) -> str:
    where = f"{config.run}: training is complete at step {trainer.steps_done}"
    if trainer.stopped is not None:
        return f"{where}: {trainer.stopped}; to continue, increase train.patience or set it to null"
    return f"{where}: all {config.train.epochs} epoch(s) are done; to continue, increase train.epochs"


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(f"recis-hybrid: {text}", file=sys.stderr)


def _scoring_parser(name: str, about: str) -> Parser:
    parser = Parser(name, about)
    parser.add_argument("run", metavar="RUN", help="folder or URL of a run of `recis-hybrid train`")
    parser.add_argument("--step", type=int, help="step of the checkpoint (the latest)")
    parser.add_argument("--device", help="device to compute on (the device of the training)")
    return parser


def _evaluate_parser() -> Parser:
    parser = _scoring_parser("evaluate", "evaluate a trained model on data; the last line on stdout is JSON")
    parser.add_argument("data", nargs="*", metavar="DATA", help="files, folders or patterns (the run's data.evaluate)")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    with joined(_device_of(args)) as here:
        run = load_run(args.run, step="latest" if args.step is None else args.step, device=here)
        figures = run.evaluate(args.data or None)
        if distributed.rank() == 0:
            print(_json({"step": run.step, **{f"eval/{name}": value for name, value in figures.items()}}))
    return 0


def _predict_parser() -> Parser:
    parser = _scoring_parser("predict", "write the scores of a trained model to a file or a folder")
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, folders or patterns; no label needed")
    parser.add_argument(
        "--out",
        required=True,
        help="output: a .parquet or .csv file, in the order of the rows; or a folder for Parquet files, which torchrun "
        "may write and which is continued after an interruption",
    )
    parser.add_argument(
        "--rows-per-file", type=int, default=ROWS_PER_FILE, metavar="N", help=f"rows of a range ({ROWS_PER_FILE:,})"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--columns", default="", metavar="NAME,NAME", help="columns of the data to write with the scores (none)"
    )
    return parser


def _predict(args: argparse.Namespace) -> int:
    from recis_hybrid.columnio.files.schema import column_types

    columns = [name for name in args.columns.split(",") if name]
    if not Path(args.out).suffix or os.path.isdir(args.out):
        return _predict_into_folder(args, columns)
    if distributed.world_size() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "predict writes one file in row order and needs a single process: start it without torchrun, or name a "
            "folder, as in --out scores"
        )
    check_output(args.out)
    run = load_run(args.run, step="latest" if args.step is None else args.step, device=args.device)
    types = column_types(args.data, read_options(run.config))
    rows = write_predictions(args.out, run.predict(args.data, columns=columns), types)
    print(f"{args.out}: {rows:,} rows, scored by step {run.step} of {run.path}")
    return 0


def _predict_into_folder(args: argparse.Namespace, columns: Sequence[str]) -> int:
    with joined(_device_of(args)) as here:
        run = load_run(args.run, step="latest" if args.step is None else args.step, device=here)
        rows = run.write_scores(
            args.out, args.data, columns=columns, rows_per_file=args.rows_per_file, quiet=args.quiet
        )
        if distributed.rank() == 0:
            print(f"{args.out}: {rows:,} rows, scored by step {run.step} of {run.path}")
    return 0


def _device_of(args: argparse.Namespace) -> str:
    """Return the device to compute on: that of the training, unless another is given."""
    if args.device is not None:
        return str(args.device)
    place, _ = run_and_step(args.run)
    return recorded_config(place).train.device if (storage_of(place).root / NAME).is_file() else "cpu"


def _report_parser() -> Parser:
    parser = Parser("report", "write the log of a run as one HTML page")
    parser.add_argument("path", metavar="RUN", help="folder or URL of a run, with log.jsonl")
    parser.add_argument("--out", type=Path, help="output file (RUN/report.html)")
    return parser


def _report(args: argparse.Namespace) -> int:
    print(write_report(args.path, args.out))
    return 0


_COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[argparse.Namespace], int]]] = {
    "init": (_init_parser, _init),
    "train": (_train_parser, _train),
    "evaluate": (_evaluate_parser, _evaluate),
    "predict": (_predict_parser, _predict),
    "report": (_report_parser, _report),
    "plan": (plan_parser, run_plan),
}
