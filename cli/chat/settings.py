"""What the user may change between two answers."""

from dataclasses import dataclass, fields, replace
from typing import Any

from hybrid_rt.sampling import Sampling
from quant.errors import UsageError

WHOLE = ("top_k", "max_new_tokens", "seed", "think_budget", "think_at_least")
OFF = ("none", "off", "random")
SHORT = {"temp": "temperature", "budget": "think_budget"}


@dataclass
class Settings:
    """think: as in `Engine.prompt_ids`. full_thinking: whether thinking stays on the screen. sampling.seed None draws a
    new one for each answer.
    """

    sampling: Sampling
    think: bool | None = None
    full_thinking: bool = False

    def set(self, name: str, text: str) -> None:
        """Give a field of the sampling a value as the user writes it. Raises UsageError, SamplingError."""
        name = SHORT.get(name, name)
        if name not in names():
            raise UsageError(f"there is no setting {name}; there are {', '.join(names())}")
        self.sampling = replace(self.sampling, **{name: parse(name, text)})

    def lines(self) -> list[str]:
        """Each setting and its value."""
        think = {None: "as the model's template has it", True: "on", False: "off"}[self.think]
        shown = [f"{name} = {_shown(getattr(self.sampling, name))}" for name in names()]
        return [*shown, f"think = {think}", f"thinking is shown {'in full' if self.full_thinking else 'folded'}"]


def names() -> list[str]:
    return [field.name for field in fields(Sampling)]


def parse(name: str, text: str) -> Any:
    """A value of a setting: a number, or None for "none" where that is allowed."""
    if text.lower() in OFF and name in WHOLE:
        return None
    try:
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        what = "a whole number, or none" if name in WHOLE else "a number"
        raise UsageError(f"{text!r} is no value for {name}; give {what}") from None


def _shown(value: object) -> str:
    return "none" if value is None else f"{value}"
