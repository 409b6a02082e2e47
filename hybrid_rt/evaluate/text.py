"""The text that models are measured on: a file, or the dialogues that ship for nano-r1.

The dialogues are plain: `User: ` and a question, `Assistant: ` and an answer, then a blank line. Each is rendered with
the model's chat template and becomes a document of its own, as that is all that nano-r1 was made for. Its problems are
of the split that was kept out of its training.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from hybrid_rt.models import BUILT_IN
from hybrid_rt.thinking import open_thinking
from hybrid_rt.tokenizer import THINK_OPEN, Tokenizer
from quant.errors import Dsr1Error

DIALOGUES = Path(__file__).parent.parent / "eval_text.txt"
DIALOGUE = re.compile(r"User: (.+?)\nAssistant: (.+?)\n(?=\nUser: |\Z)", re.DOTALL)


@dataclass(frozen=True)
class Text:
    """What a file holds. is_chat: whether dialogues are to be rendered as the model's chats."""

    content: str
    is_chat: bool = False

    def documents(self, tokenizer: Tokenizer) -> list[str]:
        """Texts that have nothing to do with each other, special tokens written out."""
        if not self.is_chat:
            return [self.content]
        return [render(question, answer, tokenizer) for question, answer in DIALOGUE.findall(self.content)]


def render(question: str, answer: str, tokenizer: Tokenizer) -> str:
    """A question and its answer, thinking included, as the model would have read and written them."""
    prompt = open_thinking(tokenizer.chat_template.render([{"role": "user", "content": question}]), True)
    return prompt + answer.removeprefix(f"{THINK_OPEN}\n") + tokenizer.special_tokens.get("eos_token", "")


def find_text(path: str | None, *models: str | None) -> Text:
    """The text in `path`; without one, the dialogues, if nano-r1 is among `models`. Raises Dsr1Error."""
    if path is not None:
        return Text(read_text(Path(path).expanduser()))
    if not set(BUILT_IN) & set(models):
        raise Dsr1Error(
            "there is no text to measure on: the built-in one is for nano-r1 alone; give a text file with --text, "
            "such as wiki.test.raw of WikiText-2"
        )
    return Text(read_text(DIALOGUES), is_chat=True)


def read_text(path: Path) -> str:
    """The whole file. Raises Dsr1Error if it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise Dsr1Error(f"there is no file {path}; give --text a file of UTF-8 text") from None
    except OSError as error:
        raise Dsr1Error(f"{path} cannot be read ({error.strerror}); give --text a file of UTF-8 text") from None
    except UnicodeDecodeError as error:
        raise Dsr1Error(
            f"{path} is not UTF-8 text (byte {error.start} is not); convert it, for instance with `iconv -t UTF-8`"
        ) from None
    if not text.strip():
        raise Dsr1Error(f"{path} is empty; give --text a file with some text in it")
    return text
