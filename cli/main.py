"""The `dsr1` command: arguments in, exit status out. Heavy packages are imported only by the work that needs them."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from cli.options import RunOptions, takes_run_options
from quant.errors import Dsr1Error

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130

app = typer.Typer(
    name="dsr1",
    help="Runs DeepSeek-R1 and V3 on one computer. Sizes such as 24G or 24GiB count in GiB.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"dsr1 {version('dsr1')}")
        raise typer.Exit


@app.callback()
def dsr1(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
@takes_run_options
def run(
    options: RunOptions,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and leave.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a prompt (-p, or text on standard input), or open a chat on a terminal."""
    if prompt is None and sys.stdin.isatty():
        if json:
            raise typer.BadParameter("--json needs -p TEXT or text on standard input")
        chat_on_terminal(options)
        return
    from cli.run import answer

    answer(options, sys.stdin.read() if prompt is None else prompt, as_json=json)


@app.command()
@takes_run_options
def chat(options: RunOptions) -> None:
    """Talk to a model on the terminal."""
    if not sys.stdin.isatty():
        raise typer.BadParameter("chat needs a terminal; use `dsr1 run -p TEXT` or pipe the text into `dsr1 run`")
    chat_on_terminal(options)


def chat_on_terminal(options: RunOptions) -> None:
    from cli.chat import Chat

    Chat(options).loop()


def main() -> None:
    """Run the command. Errors that a user can meet become a sentence on standard error."""
    try:
        app()
    except Dsr1Error as error:
        if "--debug" in sys.argv:
            raise
        print(f"dsr1: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the interpreter would complain about the closed pipe at exit
        sys.exit(EXIT_ERROR)
