"""The command ``recis-hybrid serve``.

Exit status: 0 after SIGTERM or Ctrl-C, 1 if the bundle or the address cannot be used, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.server.options import ServerOptions
from recis_hybrid.serving.server.run import Server

_HELP = {
    "host": "address to listen on; the default is this machine only, because a server has no authentication",
    "port": "TCP port; 0 takes a free one",
    "name": "name of the model in URLs; by default the name of the folder",
    "threads": "batches that are computed at once",
    "max_request_bytes": "largest body, before and after decompression",
    "max_batch": "rows up to which waiting requests are computed together",
    "max_queue": "requests that may wait; further ones are answered with 503",
    "timeout": "seconds for a request, after which it is answered with 504",
    "poll": "seconds between looks for a newer bundle; 0 waits for SIGHUP",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: "serve" and its arguments. None takes those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    args = parser.parse_args(words[1:])
    try:
        options = ServerOptions(**{field.name: getattr(args, field.name) for field in fields(ServerOptions)})
    except ValueError as error:
        text = str(error)
        name = text.split(" ", 1)[0]
        parser.error(f"--{name.replace('_', '-')}{text.removeprefix(name)}")
    logging.basicConfig(format="recis-hybrid: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("recis_hybrid.serving").setLevel(logging.INFO)
    try:
        server = Server(args.bundle, options)
        bundle = server.live.layout.bundle
        version = f"step {bundle.step}, digest {bundle.digest}"
        print(f"recis-hybrid: serving {server.name} at {server.url} ({version})", flush=True)
        # What has been loaded stays: the garbage collector need not look at it during requests.
        gc.collect()
        gc.freeze()
        server.run()
    except (ServingError, OSError, ImportError) as error:
        print(f"recis-hybrid: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with status 2, with a hint at the option that may be meant."""
        if message.startswith("unrecognized arguments: "):
            given = message.partition(": ")[2].split()[0].partition("=")[0]
            close = difflib.get_close_matches(given, self._option_string_actions, 1)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.format_usage()}{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "recis-hybrid serve",
        description="Serve a bundle by HTTP, with the Open Inference Protocol, /predict, /health and /metrics.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="output of `recis-hybrid export --bundle`; newer bundles in it are served too"
    )
    for field in fields(ServerOptions):
        default = field.default
        shown = "" if default is None else f" ({default})"
        kind = str if default is None else type(default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=default, help=f"{_HELP[field.name]}{shown}"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
