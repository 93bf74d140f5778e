"""``torch-getfuse completion``: the script by which a shell completes commands (argcomplete)."""

from __future__ import annotations

import argparse

from torch_getfuse.cli.command import PROGRAM, Command, UsageError

SHELLS = ("bash", "zsh", "fish")


def run(args: argparse.Namespace) -> int:
    """Print the script of a shell; returns the exit code.

    Raises:
        UsageError: where argcomplete is not installed.
    """
    try:
        import argcomplete
    except ModuleNotFoundError as error:
        raise UsageError(
            "completion needs argcomplete: pip install 'torch-getfuse[completion]'"
        ) from error
    print(argcomplete.shellcode([PROGRAM], shell=args.shell))
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell",
        metavar="SHELL",
        choices=SHELLS,
        help=f'{", ".join(SHELLS)}. In ~/.bashrc: eval "$({PROGRAM} completion bash)"; in ~/.zshrc '
        f'after compinit: eval "$({PROGRAM} completion zsh)"; in config.fish: '
        f"{PROGRAM} completion fish | source",
    )


COMMAND = Command(
    "completion",
    "print the script by which a shell completes commands, options and models",
    "completion bash",
    _arguments,
    run,
)
