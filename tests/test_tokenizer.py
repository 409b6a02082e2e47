"""The tokenizer against ids stored from Hugging Face transformers, and files that are missing or damaged."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from hybrid_rt.tokenizer import Tokenizer
from quant.errors import TokenizerError

CASES = json.loads((Path(__file__).parent / "data" / "tokenizer_cases.json").read_text(encoding="utf-8"))
NANO_FOLDER = Path(__file__).parents[1] / "hybrid_rt" / "nano_r1"


def tiny_folder(folder: Path, fields: dict | None = None) -> Path:
    """A model folder whose tokenizer knows the letters a to z, the space and `<think>`, `</think>`, `<s>`, `</s>`."""
    letters = {letter: i for i, letter in enumerate("Ġabcdefghijklmnopqrstuvwxyz")}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<think>", "</think>"])
    backend.save(str(folder / "tokenizer.json"))
    if fields is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: case["text"][:12])
def test_r1_ids(r1, case):
    assert r1.encode(case["text"]) == case["ids"]
    assert r1.decode(case["ids"]) == case["text"]


def test_r1_special_ids(r1):
    assert (r1.vocab_size, r1.bos_id, r1.eos_ids) == (128815, 0, (1,))
    assert (r1.think_open_id, r1.think_close_id) == (128798, 128799)


@pytest.mark.parametrize("case", CASES["chats"], ids=lambda case: case["messages"][-1]["content"])
def test_r1_chats(r1, case):
    assert r1.chat_template.render(case["messages"]) == case["rendered"]


def test_bos_is_added_on_request(tmp_path):
    tokenizer = Tokenizer.load(tiny_folder(tmp_path, {"bos_token": "<s>"}))
    assert tokenizer.encode("ab") == [1, 2]
    assert tokenizer.encode("ab", add_bos=True) == [27, 1, 2]


def test_bos_is_not_added_where_there_is_none(tmp_path):
    assert Tokenizer.load(tiny_folder(tmp_path)).encode("ab", add_bos=True) == [1, 2]


def test_special_tokens_in_text_are_parsed(tmp_path):
    assert Tokenizer.load(tiny_folder(tmp_path)).encode("a<think>b") == [1, 29, 2]


def test_vocab_size_is_past_the_highest_id(tmp_path):
    tokenizer = Tokenizer.load(tiny_folder(tmp_path))
    assert tokenizer.vocab_size == 31 == tokenizer.think_close_id + 1


def test_eos_ids_come_from_all_three_files(tmp_path):
    tiny_folder(tmp_path, {"eos_token": {"content": "</s>", "lstrip": False}})
    (tmp_path / "config.json").write_text('{"eos_token_id": 3, "bos_token_id": 27}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == (3, 5, 28)
    assert tokenizer.bos_id == 27


def test_lone_surrogates_do_not_raise(r1):
    assert r1.decode(r1.encode("a\udcffb \U0001f642")) == "a\ufffdb \U0001f642"


def test_unknown_ids_decode_to_nothing(tmp_path):
    assert Tokenizer.load(tiny_folder(tmp_path)).decode([1, 4000, 2]) == "ab"


def test_template_file_counts_before_the_field(tmp_path):
    tiny_folder(tmp_path, {"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new {{ messages[0]['content'] }}")
    assert Tokenizer.load(tmp_path).chat_template.render([{"role": "user", "content": "é"}]) == "new é"


def test_the_default_of_several_templates(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert Tokenizer.load(tiny_folder(tmp_path, {"chat_template": named})).chat_template.render([]) == "yes"


def test_without_a_template_only_chats_are_refused(tmp_path):
    tokenizer = Tokenizer.load(tiny_folder(tmp_path))
    assert tokenizer.encode("a") == [1]
    with pytest.raises(TokenizerError, match="no chat template"):
        _ = tokenizer.chat_template


def test_missing_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; copy"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE", "vocab": {"a"'])
def test_damaged_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="download it again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100000])
def test_damaged_config(tmp_path, content):
    tiny_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="download the file again"):
        Tokenizer.load(tmp_path)


def test_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(TokenizerError, match="larger than 200 MiB"):
        Tokenizer.load(tmp_path)


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(not (NANO_FOLDER / "tokenizer.json").exists(), reason="nano-r1 is not built")
def test_nano_r1_round_trip():
    tokenizer = Tokenizer.load(NANO_FOLDER)
    text = "The 12 cats\n\nsat.  <think>\nyes\n</think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids
    assert None not in (tokenizer.think_open_id, tokenizer.think_close_id)
