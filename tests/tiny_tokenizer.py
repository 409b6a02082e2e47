"""A tokenizer of single bytes for small checkpoints: `<s>` 0, `</s>` 1, `<think>` 2, `</think>` 3, then 256 bytes."""

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ("<s>", "</s>", "<think>", "</think>")
VOCAB_SIZE = len(SPECIAL) + 256


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    byte_names = sorted(ByteLevel.alphabet())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(SPECIAL)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {n: i for i, n in enumerate([*SPECIAL, *byte_names])}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
