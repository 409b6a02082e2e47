"""nano-r1's tokenizer: DeepSeek-V3's rules around a vocabulary of 512 rows.

Rows 0-7 are the special tokens, 8-263 the 256 bytes, the rest whole words of
the fixed wordings. There are no merges: a piece of text that is not in the
vocabulary as a whole becomes bytes. So digits, expressions and the letters of
a word that is to be counted stay one token a character, whatever a user types.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL = [BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, "<｜place▁holder▁no▁0｜>"]
BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID, THINK_ID, END_THINK_ID = range(7)
VOCAB_SIZE = 512
CONTEXT = 4096

WORDS = Path(__file__).parent / "words" / "vocabulary.txt"

# The three splits of DeepSeek-V3's tokenizer.json, field pre_tokenizer.
SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]

# R1's newer template for chats without tools: earlier answers lose everything
# up to </think>, and the generation prompt opens the thinking.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{{ messages | selectattr('role', 'equalto', 'system')"
    " | map(attribute='content') | join('\n\n') }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1]"
    " + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """The printable stand-in of each byte 0..255 in byte-level BPE (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _as_symbols(text: str) -> str:
    symbols = byte_symbols()
    return "".join(symbols[b] for b in text.encode())


def _vocabulary() -> dict[str, int]:
    words = [_as_symbols(line) for line in WORDS.read_text("utf-8").splitlines() if line]
    rows = [*SPECIAL, *byte_symbols(), *words]
    rows += [f"<｜unused▁{i}｜>" for i in range(len(rows), VOCAB_SIZE)]
    if len(rows) != VOCAB_SIZE or len(set(rows)) != VOCAB_SIZE:
        raise ValueError(f"{WORDS.name} must hold distinct words, {len(rows)} rows > {VOCAB_SIZE}")
    return {row: i for i, row in enumerate(rows)}


@cache
def build() -> Tokenizer:
    """The tokenizer, made from the word list; the same on every call."""
    # ignore_merges takes a piece that is a whole row as that row: a word needs
    # no chain of merges, whose links would also cut up words to be counted.
    model = models.BPE(vocab=_vocabulary(), merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(rule), "isolated") for rule in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL[:3]])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in SPECIAL[3:]])
    return tokenizer


def encode(text: str) -> list[int]:
    """Token ids of `text`; special tokens written in it are recognised."""
    return build().encode(text, add_special_tokens=False).ids


def decode(ids: list[int]) -> str:
    """The text of `ids`, special tokens included."""
    return build().decode(ids, skip_special_tokens=False)


def config() -> dict:
    """tokenizer_config.json, in the form of the published checkpoint."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def save(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    text = json.dumps(config(), ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, "utf-8")
