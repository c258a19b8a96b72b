"""The command line: `python -m fxint4 COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fxint4.errors import CommandError, Int4Error, first_line

# Command -> (module, function(argv) -> int, what it does). A module is imported when it is needed.
COMMANDS = {
    "export": ("fxint4.cli", "export", "compile a model ahead of time into a package"),
    "run": ("fxint4.cli", "run", "run a package, and time it"),
    "diff": (
        "fxint4.cli",
        "diff",
        "what a report's run changed in its graphs, or two runs differ in",
    ),
    "demo": (
        "fxint4.demo",
        "main",
        "compile a trained sentence-embedding model and compare the results",
    ),
}

#: The exit status of a process that the signal SIGPIPE ends.
_READER_GONE = 128 + 13


class _Parser(argparse.ArgumentParser):
    """Prints one line for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists the commands\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 0 for success, 1 for a command that failed, 2 for a wrong command line.
        `diff` returns 1 for reports that differ and 2 for files that can't be read. 141 if the
        reader of stdout is gone.
    """
    width = max(map(len, COMMANDS))
    parser = _Parser(
        prog="python -m fxint4",
        description='int4 weight-only inference: torch.compile(model, backend="int4tile")',
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {what}" for name, (*_, what) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", help="one of those below; `COMMAND --help` says more")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from, not only what it is",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the command")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error("a command is missing")
    if args.command not in COMMANDS:
        parser.error(f"unknown command {args.command!r}")
    module, function, _ = COMMANDS[args.command]
    arguments = [argument for argument in args.arguments if argument != "--traceback"]
    try:
        status = int(getattr(import_module(module), function)(arguments))
        print(end="", flush=True)  # here, so that an error of flushing is caught below
        return status
    except BrokenPipeError:  # the reader of stdout is gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where later output goes
        return _READER_GONE
    except Exception as error:
        if args.traceback or arguments != args.arguments:
            raise
        print(f"{parser.prog} {args.command}: {_one_line(error)}", file=sys.stderr)
        return error.status if isinstance(error, CommandError) else 1


def _one_line(error: Exception) -> str:
    """Return an error as one line: all of it if it is fxint4's own, else the first."""
    if isinstance(error, Int4Error):
        return " ".join(map(str.strip, str(error).splitlines()))
    kind, said = type(error).__name__, first_line(error)
    return f"{kind if said == kind else f'{kind}: {said}'} (--traceback shows where)"


if __name__ == "__main__":
    sys.exit(main())
