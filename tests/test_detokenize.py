"""Streamed text adds up to the full decode, and characters come whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from hybrid_rt.detokenize import CHAR_BYTES, Detokenizer
from hybrid_rt.tokenizer import Tokenizer

TEXT = "a é 你好，世界 🙂👩‍👩‍👧 x"


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes; 256 is a special token with a character that stands for no byte."""
    backend = Backend(models.BPE(vocab=CHAR_BYTES, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<｜end｜>"])
    return Tokenizer(backend, {}, (), None)


def fallback_tokenizer() -> Tokenizer:
    """SentencePiece-like: words that begin with `▁`, and the byte tokens <0x00> to <0xFF> from id 3 on."""
    words = {"<unk>": 0, "▁Hello": 1, "▁world": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    backend = Backend(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {}, (), None)


BYTES = byte_tokenizer()
FALLBACK = fallback_tokenizer()


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.feed(i) for i in ids), detokenizer.flush()]


def test_byte_table_is_the_library_s():
    assert set(CHAR_BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(CHAR_BYTES.values()) == list(range(256))


@given(st.lists(st.integers(0, 257), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_ids_add_up(ids):
    assert "".join(stream(BYTES, ids)) == BYTES.decode(ids)


@given(st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_as_utf8(data):
    assert "".join(stream(BYTES, list(data))) == data.decode("utf-8", "replace")


@given(st.text(max_size=30))
@settings(deadline=None)
def test_characters_come_whole(text):
    pieces = stream(BYTES, list(text.encode()))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


def test_incomplete_character_at_the_end():
    assert stream(BYTES, [0x61, 0xE4, 0xBD]) == ["a", "", "", "\ufffd"]


def test_special_token_after_an_incomplete_character():
    assert stream(BYTES, [0xE4, 256, 0x61]) == ["", "\ufffd<｜end｜>", "a", ""]


def test_flush_starts_anew():
    detokenizer = Detokenizer(BYTES)
    detokenizer.feed(0xE4)
    assert (detokenizer.flush(), detokenizer.flush(), detokenizer.feed(0x61)) == ("\ufffd", "", "a")


def test_r1_random_ids(r1):
    @given(st.lists(st.integers(0, r1.vocab_size - 1) | st.integers(0, 260), max_size=40))
    @settings(deadline=None)
    def check(ids):
        assert "".join(stream(r1, ids)) == r1.decode(ids)

    check()


def test_r1_text(r1):
    pieces = stream(r1, r1.encode(TEXT))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_fallback_keeps_spaces_and_characters():
    ids = [1, 2, *(byte + 3 for byte in "é你🙂".encode()), 1]
    pieces = stream(FALLBACK, ids)
    assert "".join(pieces) == FALLBACK.decode(ids) == "Hello worldé你🙂 Hello"
    assert pieces[:2] == ["Hello", " world"]
    assert not any("\ufffd" in piece for piece in pieces)


def test_fallback_does_not_hold_back_invalid_bytes_forever():
    pieces = stream(FALLBACK, [0xFF + 3] * 50)
    assert "".join(pieces) == "\ufffd" * 50
    assert any(pieces[:10])


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK])
def test_nothing_fed(tokenizer):
    assert Detokenizer(tokenizer).flush() == ""
