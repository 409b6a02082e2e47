"""Recipes: rules for which component of any model gets which format. They are data, in TOML: docs/quality.md.

Those that ship are read from recipe_data/, a user's from a file of the same form. Nothing here needs torch.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from quant.config import ModelConfig
from quant.errors import StoreError
from quant.packed import PACKED_FORMATS, PackedFormat
from quant.store_formats import LINEARS, ExpertFormats, StoreFormats

DEFAULT_RECIPE = "balanced"
SHIPPED = ("fast", "balanced", "accurate", "q8")
FOLDER = Path(__file__).parent / "recipe_data"
SUFFIX = ".toml"
MATRICES = ("gate_up", "down")
SELECTORS = ("first", "last", "range")
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class LayerRule:
    """Formats of the routed experts of some layers.

    first, last: so many layers with experts from the front or the end, as a share of them, rounded up to whole layers.
    numbers: first and last layer, both included. One of these three is given. formats: by "gate_up" and "down".
    """

    formats: Mapping[str, PackedFormat]
    first: float = 0.0
    last: float = 0.0
    numbers: tuple[int, int] | None = None

    def layers(self, with_experts: range) -> range:
        """Those of the layers `with_experts` that the rule is for."""
        if self.numbers is not None:
            return range(max(self.numbers[0], with_experts.start), min(self.numbers[1] + 1, with_experts.stop))
        if self.first:
            return with_experts[: ceil(self.first * len(with_experts))]
        return with_experts[len(with_experts) - ceil(self.last * len(with_experts)) :]


@dataclass(frozen=True)
class Recipe:
    """Rules for any model. experts: in every layer; rules: in some, the later ones win. linears: by kind."""

    name: str
    experts: ExpertFormats
    rules: tuple[LayerRule, ...]
    linears: Mapping[str, tuple[PackedFormat, ...]]

    def of(self, config: ModelConfig, embedding: str = "bf16") -> StoreFormats:
        """The formats of a store of one model. An MTP layer's experts have the formats that no rule changes."""
        every = range(config.n_layers + config.n_mtp_layers)
        experts = {layer: self.experts for layer in every if config.is_moe(layer)}
        with_experts = range(min(experts, default=config.n_layers), config.n_layers)
        for rule in self.rules:
            for layer in rule.layers(with_experts):
                before = experts[layer]
                chosen = {"gate_up": before.gate_up, "down": before.down, **rule.formats}
                experts[layer] = ExpertFormats(**chosen)
        return StoreFormats(self.name, experts, self.linears, embedding)


def find_recipe(name: str) -> Recipe:
    """The shipped recipe of that name, or the one in a file whose name ends in .toml. Raises StoreError."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(SUFFIX):
        raise StoreError(f"there is no recipe {name!r}; give one of {', '.join(RECIPES)}, or a file NAME{SUFFIX}")
    path = Path(name).expanduser()
    if path.stem in RECIPES:
        raise StoreError(f"{path} has the name of a recipe that ships with dsr1, {path.stem}; give it another name")
    return read_recipe(path)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, named like it. Raises StoreError, naming the key, for one that is not as it should be."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise StoreError(f"{path} is larger than any recipe; give a TOML file of a few lines (docs/quality.md)")
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"there is no recipe file {path}; give one of {', '.join(SHIPPED)}, or a TOML file") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StoreError(f"{path} is no TOML ({error}); correct it there, docs/quality.md has an example") from None
    return _Parser(path).recipe(fields)


class _Parser:
    """Parsed TOML to a Recipe; refuses all that it does not know."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def recipe(self, fields: Mapping[str, Any]) -> Recipe:
        self._keys(fields, "the file", ("experts", "linears"))
        experts = self._table(fields["experts"], "experts")
        self._keys(experts, "[experts]", MATRICES, ("layers",))
        linears = self._table(fields["linears"], "linears")
        self._keys(linears, "[linears]", LINEARS)
        rules = experts.get("layers", [])
        if not isinstance(rules, list):
            raise self._refusal("experts.layers is not a list of tables, [[experts.layers]]")
        return Recipe(
            self.path.stem,
            ExpertFormats(*(self._format(experts[name], f"experts.{name}") for name in MATRICES)),
            tuple(self._rule(rule) for rule in rules),
            {kind: self._formats(linears[kind], f"linears.{kind}") for kind in LINEARS},
        )

    def _rule(self, given: Any) -> LayerRule:
        rule = self._table(given, "experts.layers")
        self._keys(rule, "[[experts.layers]]", (), (*SELECTORS, *MATRICES))
        formats = {name: self._format(rule[name], f"experts.layers.{name}") for name in MATRICES if name in rule}
        chosen = [name for name in SELECTORS if name in rule]
        if len(chosen) != 1 or not formats:
            raise self._refusal("[[experts.layers]] needs one of first, last and range, and gate_up or down")
        if chosen == ["range"]:
            return LayerRule(formats, numbers=self._numbers(rule["range"]))
        shares = {name: self._share(rule[name], f"experts.layers.{name}") for name in chosen}
        return LayerRule(formats, first=shares.get("first", 0.0), last=shares.get("last", 0.0))

    def _share(self, given: Any, key: str) -> float:
        if type(given) is not float or not 0 < given <= 1:
            raise self._refusal(f"{key} is {given!r}; a share is a number with a point, above 0.0 and at most 1.0")
        return given

    def _numbers(self, given: Any) -> tuple[int, int]:
        if isinstance(given, list) and len(given) == 2 and all(type(number) is int for number in given):
            first, last = given
            if 0 <= first <= last:
                return first, last
        raise self._refusal(f"experts.layers.range is {given!r}; give the first and the last layer, such as [3, 10]")

    def _formats(self, given: Any, key: str) -> tuple[PackedFormat, ...]:
        if not isinstance(given, list) or not given:
            raise self._refusal(f'{key} is {given!r}; give a list of formats, such as ["q8", "accurate"]')
        formats = tuple(self._format(name, key) for name in given)
        if sorted(set(formats), key=_exactness) != list(formats):
            raise self._refusal(f"{key} is {given!r}; give each format once, the one with most bits first")
        return formats

    def _format(self, name: Any, key: str) -> PackedFormat:
        if not isinstance(name, str) or name not in PACKED_FORMATS:
            raise self._refusal(f"{key} is {name!r}; the formats are {', '.join(PACKED_FORMATS)}")
        return PACKED_FORMATS[name]

    def _table(self, given: Any, key: str) -> Mapping[str, Any]:
        if not isinstance(given, dict):
            raise self._refusal(f"{key} is {given!r} and not a table")
        return given

    def _keys(
        self, fields: Mapping[str, Any], where: str, needed: tuple[str, ...], allowed: tuple[str, ...] = ()
    ) -> None:
        for key in needed:
            if key not in fields:
                raise self._refusal(f"{where} lacks {key!r}")
        for key in fields:
            if key not in needed and key not in allowed:
                raise self._refusal(f"{where} has an unknown key {key!r}; known are {', '.join((*needed, *allowed))}")

    def _refusal(self, what: str) -> StoreError:
        return StoreError(f"{self.path} is no recipe: {what} (docs/quality.md has an example)")


def _exactness(fmt: PackedFormat) -> float:
    return -fmt.bits_per_weight


RECIPES = {name: read_recipe(FOLDER / f"{name}{SUFFIX}") for name in SHIPPED}
