"""The options that commands share, declared once: name, type, default and help."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from quant.isa import INSTRUCTION_SETS, force


def _force(name: str | None) -> None:
    if name is not None:
        force(name)


# Takes effect while options are read, because Numba must not be imported before.
IsaOption = Annotated[
    str | None,
    typer.Option(
        "--isa", metavar="NAME", callback=_force, help=f"{', '.join(INSTRUCTION_SETS)}. Default: the best there is."
    ),
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pin", metavar="PART=WHAT", help="Fix a choice of the plan, as in experts:3-5=gpu; may be repeated."
    ),
]


DeferOption = Annotated[
    int | None,
    typer.Option(
        "--defer-experts", metavar="N", help="Let a token's N lightest experts join a layer later. Default: 0."
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """What the user asked of `dsr1 run` or `dsr1 chat`; None means the model's or the program's default."""

    model: Annotated[str, typer.Argument(help="Model folder, downloaded Hub id, or built-in name.")] = "nano-r1"
    gpu_mem: Annotated[
        str | None, typer.Option(metavar="SIZE", help="GPU memory to use, CUDA included; 24G means 24 GiB.")
    ] = None
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="RAM to use. Default: what is available, less a reserve.")
    ] = None
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens a conversation may hold. Default: 32768 or the model's maximum."),
    ] = None
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after N tokens. Default: the context's end.")
    ] = None
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0.0, help="0 takes the likeliest token. Default: the model's.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(metavar="P", min=0.0, max=1.0, help="Nucleus sampling. Default: the model's.")
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="The same seed gives the same tokens.")] = None
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Make the model think first, or answer at once.")
    ] = None
    think_budget: Annotated[int | None, typer.Option(metavar="N", min=0, help="Close the thinking after N tokens.")] = (
        None
    )
    think_at_least: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Let the thinking not end before N tokens."),
    ] = None
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep computed tokens on disk, for prompts that begin alike.")
    ] = True
    cache_size: Annotated[str, typer.Option(metavar="SIZE", help="Disk that these may take; the oldest go first.")] = (
        "8G"
    )
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, or emulate: a GPU of --gpu-mem, counted.")] = (
        "auto"
    )
    residency: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Routed experts in RAM: mapped, locked or copied. Default: the plan's choice."
        ),
    ] = None
    plan: Annotated[str | None, typer.Option(metavar="FILE", help="Keep to a plan of `dsr1 plan --save`.")] = None
    pin: PinOption = None
    defer_experts: DeferOption = None
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads. Default: all cores.")] = None
    isa: IsaOption = None
    verify: Annotated[bool, typer.Option("--verify", help="Compare the store's checksums first.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(options, **own)` a signature of RunOptions' fields and its own parameters, for typer to read."""
    own = list(inspect.signature(command).parameters.values())[1:]
    hints = get_type_hints(RunOptions, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(RunOptions)
        if f.default is not MISSING
    ]

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        options = RunOptions(**{f.name: arguments.pop(f.name) for f in fields(RunOptions)})
        command(options, **arguments)

    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        shared + [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    )
    wrapper.__annotations__ = {p.name: p.annotation for p in [*shared, *own]}
    return wrapper
