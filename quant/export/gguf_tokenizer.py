"""tokenizer.json under llama.cpp's names: byte-level BPE with the splits of DeepSeek-V3."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import TokenizerError
from quant.export.gguf_file import Value

MAX_BYTES = 200 * 2**20
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
# The rules that cut a text into pieces, by their name in llama.cpp; written in C or in Python, \r and \n are the same.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK_PRE = "deepseek-v3"
# For a vocabulary whose pieces are looked up whole before merges (nano-r1's). llama.cpp does that with other rules
# only. These cut texts otherwise where s, t, m, d, re, ve or ll and more letters follow an apostrophe that begins a
# line or stands after a letter or digit, and at combining marks.
WHOLE_PIECES_PRE = "llama-bpe"


def tokenizer_fields(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The fields of the tokenizer in `folder`, with a token for each of `vocab_size` rows of the embedding.

    Raises TokenizerError if its files are missing or damaged, or it is of a kind that llama.cpp has no name for.
    """
    path = folder / "tokenizer.json"
    tokenizer = _read_object(path)
    if tokenizer is None:
        raise TokenizerError(
            f"{folder} has no tokenizer.json, which a GGUF file holds a copy of; copy tokenizer.json and "
            "tokenizer_config.json there from the page where the model was published"
        )
    settings = _read_object(folder / "tokenizer_config.json") or {}
    try:
        fields = _fields(tokenizer, settings, vocab_size) | _template(folder, settings)
        _check_texts(fields)
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeEncodeError) as error:
        raise TokenizerError(f"{path} is damaged ({error!r}); download it again") from None
    return fields


def _check_texts(fields: Mapping[str, Value]) -> None:
    """Raise UnicodeEncodeError if a text is none that can be written: JSON may hold halves of characters."""
    for value in fields.values():
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, list):
            "".join(text for text in value if isinstance(text, str)).encode()


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TokenizerError(
                f"{path} is larger than {MAX_BYTES >> 20} MiB, so it cannot be a tokenizer; replace it"
            )
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error}); download the file again") from None
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path} is not a JSON object; download the file again")
    return fields


def _fields(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], vocab_size: int) -> dict[str, Value]:
    model = tokenizer["model"]
    if model["type"] != "BPE" or tuple(_splits(tokenizer["pre_tokenizer"])) != SPLITS:
        raise TokenizerError(
            "tokenizer.json is not that of DeepSeek-V3 or R1, and llama.cpp knows others by name only; convert this "
            "model with llama.cpp's own converter"
        )
    tokens, types = _tokens(model["vocab"], tokenizer["added_tokens"], vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": WHOLE_PIECES_PRE if model.get("ignore_merges") else DEEPSEEK_PRE,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **_special_ids({text: number for number, text in enumerate(tokens)}, settings),
    }


def _splits(pre_tokenizer: Mapping[str, Any]) -> list[str]:
    """The patterns by which a text is cut, with line ends as they are written in a pattern."""
    steps = pre_tokenizer["pretokenizers"]
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    return [pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in patterns]


def _tokens(vocab: Mapping[str, int], added: list[Mapping[str, Any]], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each token; rows of the embedding without a token get a name that no text has."""
    texts = {number: text for text, number in vocab.items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for token in added:
        number, text = token["id"], token["content"]
        texts[number] = text
        kinds[number] = CONTROL if token["special"] or _looks_special(text) else USER_DEFINED
    if texts and not 0 <= min(texts) <= max(texts) < vocab_size:
        raise TokenizerError(
            f"tokenizer.json has ids up to {max(texts)}, and the model's embedding {vocab_size} rows; download both "
            "from one place"
        )
    numbers = range(vocab_size)
    return [texts.get(i, f"[PAD{i}]") for i in numbers], [kinds.get(i, UNUSED) for i in numbers]


def _looks_special(text: str) -> bool:
    """Whether a token is for the chat template, and so nothing that a reader should see."""
    return text.startswith("<｜") and text.endswith("｜>")


def _special_ids(numbers: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, Value]:
    fields: dict[str, Value] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        told = settings.get(f"{ours}_token")
        text = told["content"] if isinstance(told, dict) else told
        if isinstance(text, str) and text in numbers:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = numbers[text]
    for ours in ("bos", "eos"):
        fields[f"tokenizer.ggml.add_{ours}_token"] = settings.get(f"add_{ours}_token") is True
    return fields


def _template(folder: Path, settings: Mapping[str, Any]) -> dict[str, Value]:
    """The chat template: a file of its own in newer folders, which then counts, or in tokenizer_config.json."""
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read as text ({error}); download the file again") from None
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
