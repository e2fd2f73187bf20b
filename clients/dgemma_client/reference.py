"""The command's help as a page: `python -m dgemma_client.reference > docs/cli.md`. Knows only the command's help."""

from __future__ import annotations

import typer

from dgemma_client.cli import app

_HEAD = """# The command `dgemma`

Made by `python -m dgemma_client.reference > docs/cli.md`; a test holds it to the command.
"""


def render() -> str:
    """The page, in Markdown."""
    group = typer.main.get_command(app)
    context = group.make_context("dgemma", [], resilient_parsing=True, terminal_width=100)
    parts = [_HEAD, _fenced("dgemma --help", group.get_help(context))]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True, terminal_width=100)
        parts += [f"## {name}\n", _fenced(f"dgemma {name} --help", command.get_help(inner))]
    return "\n".join(parts)


def _fenced(command: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return f"```console\n$ {command}\n{lines}\n```\n"


if __name__ == "__main__":
    print(render(), end="")
