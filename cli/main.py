"""The `dsr1` command: arguments in, exit status out. Heavy packages are imported only by the work that needs them."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from cli.escape import say
from cli.options import DeferOption, IsaOption, PinOption, RunOptions, takes_run_options
from quant.errors import Dsr1Error, UsageError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

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
def chat(
    options: RunOptions,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the latest conversation.")] = False,
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Continue the conversation of this name or id.")
    ] = None,
) -> None:
    """Talk to a model on the terminal."""
    if not sys.stdin.isatty():
        raise typer.BadParameter("chat needs a terminal; use `dsr1 run -p TEXT` or pipe the text into `dsr1 run`")
    chat_on_terminal(options, resume, session)


@app.command()
def quantize(
    src: Annotated[str, typer.Argument(help="Published checkpoint: folder, Hub id, or nano-r1-fp8.")],
    dst: Annotated[
        str | None, typer.Argument(help="Folder of the store; a conversion that was stopped there goes on.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="fast, balanced (default), accurate, q8, or a TOML file; or see --to."),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="store; gguf (recipes q4_k, q4_0, q8_0); compressed-tensors (recipes experts, linears).",
        ),
    ] = "store",
    calibrate: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Run this text through the model to see which columns count.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take an importance matrix of llama.cpp instead.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads. Default: all cores.")] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Of a model on the Hub: branch, tag or commit. Default: newest.")
    ] = None,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Leave downloaded shards in the Hub's cache; else they are deleted.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Convert nothing: compare the checksums of a store.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert a published checkpoint into a 4-bit store that loads in seconds."""
    if verify:
        if dst is not None:
            raise typer.BadParameter("--verify takes one folder, the store")
        from cli.verify import verify as verify_store

        verify_store(src, json)
        return
    if dst is None:
        raise typer.BadParameter("give the folder of the store after the checkpoint")
    from cli.quantize import HubOptions

    if to != "store":
        _refuse_store_options(to, {"--calibrate": calibrate, "--imatrix": imatrix})
        from cli.export import export

        export(src, dst, to, recipe, jobs, json, HubOptions(revision, keep_source))
        return
    from cli.quantize import quantize as convert
    from quant.recipes import DEFAULT_RECIPE

    convert(src, dst, recipe or DEFAULT_RECIPE, jobs, json, HubOptions(revision, keep_source), calibrate, imatrix)


def _refuse_store_options(to: str, given: dict[str, object]) -> None:
    """Raise UsageError for options that an export would do nothing with."""
    unused = [name for name, value in given.items() if value]
    if unused:
        named = " and ".join(unused)
        raise UsageError(f"{named} would be without effect with --to {to}; leave that out, or write a store")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Store, checkpoint, built-in name, or any Hub id.")] = "nano-r1",
    gpu_mem: Annotated[str | None, typer.Option(metavar="SIZE", help="GPU memory, CUDA included.")] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="RAM. Default: what is available here.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens a conversation may hold.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Plan for the store that `dsr1 quantize --recipe NAME` makes."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cuda, cpu or emulate.")] = "auto",
    residency: Annotated[
        str | None, typer.Option(metavar="NAME", help="Routed experts in RAM: mapped, locked or copied.")
    ] = None,
    pin: PinOption = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for another machine: one that ships, or a file.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="How often experts are used: the most used go to the GPU first.")
    ] = None,
    defer_experts: DeferOption = None,
    load: Annotated[str | None, typer.Option("--plan", metavar="FILE", help="Show a saved plan.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan, for `dsr1 run --plan`.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each choice was made.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Say what fits and where everything goes, before anything is downloaded."""
    from cli.plan import Output
    from cli.plan import plan as show_plan
    from offload.wishes import Wishes

    pins = tuple(pin or ())
    wishes = Wishes(
        gpu_mem,
        ram,
        context,
        device,
        residency=residency,
        pins=pins,
        hardware=hardware,
        profile=profile,
        plan=load,
        defer_experts=defer_experts,
    )
    show_plan(model, wishes, recipe, Output(json, explain, save))


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Model whose disk is measured. Default: one in the caches.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure how fast RAM and the disk are read.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Say what this machine has, what that means for dsr1, and what to change."""
    from cli.doctor import doctor as examine

    if not examine(json, measure, model):
        raise typer.Exit(EXIT_ERROR)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="Model to measure end to end. Default: the built-in one.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure random layers: r1, v3, v2, k2, moonlight, nano."),
    ] = None,
    fmt: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="accurate (default), fast or q8; for a shape.")
    ] = None,
    decode: Annotated[str | None, typer.Option(metavar="LIST", help="Tokens a call. Default: 1,2,4,8,16.")] = None,
    prefill: Annotated[str | None, typer.Option(metavar="LIST", help="Tokens a call. Default: 128,512,2048.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads. Default: all cores.")] = None,
    residency: Annotated[
        str | None, typer.Option(metavar="NAME", help="A model's experts in RAM: mapped, locked or copied.")
    ] = None,
    defer_experts: DeferOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a roofline; needs matplotlib.")] = None,
    isa: IsaOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure a model, or layers of a known shape, beside the limits of this machine."""
    from cli.bench import bench as run_bench

    run_bench(model, shape, fmt, decode, prefill, threads, json, plot, residency, defer_experts)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, downloaded Hub id, or built-in name.")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Reference to compare with.")] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Text to predict, UTF-8.")] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with what --save-reference wrote.")
    ] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the likeliest tokens of each prediction, or which problems were solved."
        ),
    ] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="Solve nano-r1's held-out problems instead.")] = False,
    problems: Annotated[int, typer.Option(metavar="N", min=2, help="Problems of each task.")] = 1000,
    window: Annotated[int | None, typer.Option(metavar="N", min=2, help="Tokens of a window. Default: 512.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens that the cache holds.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads. Default: all cores.")] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="bfloat16 or float32.")] = "bfloat16",
    defer_experts: DeferOption = None,
    budgets: Annotated[
        str | None, typer.Option(metavar="LIST", help="Measure accuracy at these budgets of thinking: 0,64,none.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines of question and answer, for --budgets.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw --budgets; needs matplotlib.")] = None,
    isa: IsaOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from the model that it was made from."""
    if budgets is not None:
        from cli.eval_budgets import BudgetOptions, measure_thinking

        measure_thinking(model, BudgetOptions(budgets, questions, plot, context, threads, dtype, json, defer_experts))
        return
    from cli.eval import EvalOptions, measure

    options = EvalOptions(
        against, text, reference, save_reference, tasks, problems, window, context, threads, dtype, json, defer_experts
    )
    measure(model, options)


def chat_on_terminal(options: RunOptions, resume: bool = False, session: str | None = None) -> None:
    from cli.chat.loop import Chat

    Chat(options, resume, session).loop()


def main() -> None:
    """Run the command. Errors that a user can meet become a sentence on standard error."""
    try:
        app()
    except Dsr1Error as error:
        if "--debug" in sys.argv:
            raise
        say(f"dsr1: {error}")
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the interpreter would complain about the closed pipe at exit
        sys.exit(EXIT_ERROR)
    except (OSError, UnicodeDecodeError) as error:  # files that may not be read, input that is no text
        if "--debug" in sys.argv:
            raise
        say(f"dsr1: {error}; check the file and its permissions")
        sys.exit(EXIT_ERROR)
