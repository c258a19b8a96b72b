"""The command line: `python -m fxint4 COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

# Command -> (module with a `main(argv) -> int`, what it does). Imported only when it is asked for.
COMMANDS = {
    "demo": ("fxint4.demo", "compile a trained sentence-embedding model and compare the results"),
}


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists the commands\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process unless given.

    Returns:
        The exit status: 0 if all went well, 2 for a wrong command line.
    """
    width = max(map(len, COMMANDS))
    parser = _Parser(
        prog="python -m fxint4",
        description='int4 weight-only inference: torch.compile(model, backend="int4tile")',
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", help="one of those below; `COMMAND --help` says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the command")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error("a command is missing")
    if args.command not in COMMANDS:
        parser.error(f"unknown command {args.command!r}")
    module, _ = COMMANDS[args.command]
    return int(import_module(module).main(args.arguments))


if __name__ == "__main__":
    sys.exit(main())
