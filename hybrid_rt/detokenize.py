"""Token ids to text as they come, one at a time, in constant time each."""

import codecs

from hybrid_rt.tokenizer import Tokenizer

# Longest run of tokens without a whole character: no character has more bytes, and a byte is a token at most.
MAX_PENDING = 8


def byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2, encoder.py, `bytes_to_unicode`).

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


CHAR_BYTES = byte_of_char()


class Detokenizer:
    """Turns one sequence of ids into text. What `feed` and the last `flush` return adds up to `decode` of all ids.

    A character is returned whole, with the token that completes it. For tokenizers that are not byte-level the sum
    is exact where the text is valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = _ByteStream(tokenizer) if tokenizer.is_byte_level else _WindowStream(tokenizer)

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        return self._stream.feed(token_id)

    def flush(self) -> str:
        """What is left at the end: bytes of an incomplete character become U+FFFD. The next `feed` starts anew."""
        return self._stream.flush()


class _ByteStream:
    """Byte-level vocabularies: a token is a string of bytes, whatever is around it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes(token_id))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

    def _bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        try:
            return bytes([CHAR_BYTES[char] for char in token])
        except KeyError:  # special tokens are written as they are
            return token.encode("utf-8")


class _WindowStream:
    """Other vocabularies: decode the last few tokens with and without the new one, and return the difference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # already returned; decides for instance on the space before the next token
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._difference()
        if not text or text.endswith("\ufffd") and len(self._pending) < MAX_PENDING:
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        text = self._difference()
        self._context, self._pending = [], []
        return text

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _advance(self) -> None:
        self._context, self._pending = self._pending, []
