"""Text to token ids and back, from the files that a model is published with.

`tokenizer.json` is read by the `tokenizers` library; `tokenizer_config.json`, `config.json` and
`generation_config.json` say which tokens begin and end a text.

Special tokens written out in a text become those tokens, in a chat message too, as in DeepSeek's and other
runtimes: prompts are stored and exchanged in that form. Whoever writes a message could therefore close a turn in
it; on one's own machine that is nothing which the system prompt does not allow anyway. A program that passes on
messages of strangers has to remove such tokens first.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel

from hybrid_rt.chat_template import ChatTemplate
from quant.errors import TokenizerError

MAX_TOKENIZER_BYTES = 200 * 2**20
MAX_CONFIG_BYTES = 8 * 2**20
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A model's tokens. `vocab_size` is the highest id plus one: embedding rows from there on are padding.

    `bos_id`, `think_open_id` and `think_close_id` are None where the model has no such token. A sequence ends at
    any of `eos_ids`.
    """

    def __init__(
        self, backend: Backend, special_tokens: Mapping[str, str], eos_ids: Sequence[int], template: str | None
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=False), *_past_added(backend))
        self.bos_id = self._id_of(special_tokens.get("bos_token"))
        self.think_open_id = self._id_of(THINK_OPEN)
        self.think_close_id = self._id_of(THINK_CLOSE)
        self.is_byte_level = isinstance(backend.decoder, ByteLevel)
        self._template = template

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """The tokenizer of a checkpoint or store. Raises TokenizerError if its files are missing or damaged."""
        folder = Path(folder)
        backend = _load_backend(folder)
        fields = _read_json(folder / "tokenizer_config.json")
        config = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json")
        special = {name: text for name in SPECIAL_NAMES if (text := _token_text(fields.get(name)))}
        if "bos_token" not in special and (text := _text_of_id(backend, config.get("bos_token_id"))):
            special["bos_token"] = text
        eos_ids = {*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}
        eos_ids |= {i for i in (backend.token_to_id(special.get("eos_token", "")),) if i is not None}
        return cls(backend, special, sorted(eos_ids), _read_template(folder, fields))

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of `text`, special tokens in it included. A rendered chat already begins with its own."""
        # A terminal hands over undecodable input as lone surrogates, which have no UTF-8 form.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Compiled when first asked for. Raises TokenizerError if the model has none or it is damaged."""
        if self._template is None:
            raise TokenizerError(
                "this model has no chat template, so it is not made for conversations; "
                "copy chat_template.jinja from a chat model of its family into the folder"
            )
        return ChatTemplate(self._template, self.special_tokens)

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self.backend.token_to_id(text)


def _past_added(backend: Backend) -> list[int]:
    return [i + 1 for i in backend.get_added_tokens_decoder()] or [0]


def _load_backend(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    content = _read_limited(path, MAX_TOKENIZER_BYTES)
    if content is None:
        raise TokenizerError(
            f"{folder} has no tokenizer.json; copy tokenizer.json and tokenizer_config.json there from the page "
            "where the model was published"
        )
    try:
        return Backend.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path} is damaged ({error}); download it again") from None


def _read_limited(path: Path, limit: int) -> bytes | None:
    """The bytes of `path`, or None if there is no such file."""
    try:
        if path.stat().st_size > limit:
            raise TokenizerError(
                f"{path} is larger than {limit >> 20} MiB, so it cannot be what its name says; replace it"
            )
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty if there is no such file."""
    content = _read_limited(path, MAX_CONFIG_BYTES)
    try:
        fields = {} if content is None else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error}); download the file again") from None
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path} is not a JSON object; download the file again")
    return fields


def _read_template(folder: Path, fields: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own in newer folders, which then counts, or in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    content = _read_limited(path, MAX_CONFIG_BYTES)
    if content is not None:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise TokenizerError(f"{path} is not UTF-8 text; download the file again") from None
    template = fields.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json is its text, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _text_of_id(backend: Backend, token_id: Any) -> str | None:
    return next((backend.id_to_token(i) for i in _ids(token_id)), None)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31]
