"""Chat messages to a prompt, through the Jinja template that a model is published with.

The environment is the one that Hugging Face transformers gives to templates (`utils/chat_template_utils.py`):
sandboxed, with `raise_exception`, `strftime_now`, a plain `tojson`, and `break` and `continue`. A template comes from
whoever published the model: the sandbox keeps it from everything outside, and here its size, its running time and the
texts that it builds are bounded as well.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quant.errors import TokenizerError

MAX_SOURCE_CHARS = 2**20
MAX_TEXT_CHARS = 2**26  # of a prompt, and of any value on the way to it
MAX_ARGUMENT = 10**6  # a larger number is a width or a repetition that fills the memory
MAX_SECONDS = 10.0

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template. `special_tokens` are visible in it by name: `bos_token`, `eos_token`, ..."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises TokenizerError if `source` is not a template."""
        self.source, self.special_tokens = source, dict(special_tokens)
        self._environment = _Environment()
        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(
                f"the model's chat template has {len(source)} characters and at most {MAX_SOURCE_CHARS} are accepted; "
                "use the one from the page where the model was published"
            )
        try:
            self._template = self._environment.compile_guarded(source)
        except Exception as error:
            raise TokenizerError(f"the model's chat template is damaged ({error}); download it again") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`, each with `role` and `content`, ready for `Tokenizer.encode`.

        `add_generation_prompt` opens the assistant's turn at the end. Raises TokenizerError if the template
        refuses the messages, fails on them, or does not end.
        """
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
        }
        self._environment.start_clock()
        try:
            return _join_bounded(self._template.generate(variables))
        except _Refusal as error:
            raise TokenizerError(f"the model's chat template refuses this conversation: {error}") from None
        except Exception as error:
            raise TokenizerError(
                f"the model's chat template fails on this conversation ({type(error).__name__}: {error}); "
                "check that every message has a role and a text, or use another template"
            ) from None


class _Refusal(jinja2.TemplateError):
    """Raised by the template itself."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a clock that every loop looks at and a bound on every value an operation makes."""

    intercepted_binops = frozenset(("*", "**", "+"))

    def __init__(self) -> None:
        # Not optimized: constant expressions would be evaluated while compiling, out of the guards' reach.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], optimized=False)
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        self.filters.update(tojson=_tojson, bounded=_bounded)
        self.start_clock()

    def start_clock(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise OverflowError(f"it runs for more than {MAX_SECONDS:.0f} seconds")

    def join(self, *values: Any) -> str:
        return "".join(map(str, values))

    def compile_guarded(self, source: str) -> jinja2.Template:
        """Compile with a call of `tick` in each loop and macro, and with bounded string building."""
        tree = self.parse(source)
        repeated: list[Any] = [*tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))]
        for block in repeated:
            block.body.insert(0, nodes.ExprStmt(_call("tick", [])))
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = nodes.Filter(block.filter, "bounded", [], [], None, None)
        _replace_concats(tree)
        tree.set_environment(self)
        return self.template_class.from_code(self, self.compile(tree), self.globals)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            _check_argument(argument)
        return _bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+":
            _check_argument(left)
            _check_argument(right)
        if operator == "*" and max(_size(left) * _number(right), _size(right) * _number(left)) > MAX_TEXT_CHARS:
            raise OverflowError("it makes a text that is too long")
        if operator == "**" and _number(right) > 64:
            raise OverflowError("it makes a number that is too large")
        return _bounded(super().call_binop(context, operator, left, right))


def _call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


def _replace_concats(node: nodes.Node) -> None:
    """Turn each `a ~ b` under `node` into a call, whose result is bounded."""
    for name, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if isinstance(child, nodes.Node):
                _replace_concats(child)
            if isinstance(child, nodes.Concat):
                children[i] = _call("join", child.nodes)
        setattr(node, name, children if isinstance(value, list) else children[0])


def _join_bounded(pieces: Any) -> str:
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > MAX_TEXT_CHARS:
            raise OverflowError(f"it writes more than {MAX_TEXT_CHARS} characters")
    return "".join(kept)


def _check_argument(value: Any) -> None:
    if isinstance(value, int) and abs(value) > MAX_ARGUMENT:
        raise OverflowError(f"it calculates with a number beyond {MAX_ARGUMENT}")


def _bounded(value: Any) -> Any:
    if _size(value) > MAX_TEXT_CHARS:
        raise OverflowError(f"it makes a text of more than {MAX_TEXT_CHARS} characters")
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own filter this does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
