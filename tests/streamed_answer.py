"""A program that shows an answer made up for a test, as the chat shows a model's: `python -m tests.streamed_answer`."""

import sys
import time
from collections.abc import Iterator

from cli.terminal.answer import AnswerView
from cli.terminal.screen import Screen
from hybrid_rt.generation import Step, Timings

REASONING = "The user wants a table.\nLet me think about wide characters: 中文字符。\n" + "and so on " * 60
ANSWER = """\
# 比较 Comparison

这是一个很长的段落，用来检查宽字符在终端里换行是否正确，**重点**要看得清楚，`代码` 也要看得清楚。这是一个很长的段落，\
用来检查宽字符在终端里换行是否正确。

- first point, with *emphasis*
- 第二点：`x * y`
  1. nested

| 名称 | name | size |
|:--|:-:|--:|
| 甲 | alpha | 1 |
| 乙乙 | beta | 2048 |

```python
def double(x):
    return x * 2
```

$$
E = mc^2
$$

Hostile: \x1b[31mred\x1b[0m \x1b]0;title\x07 [bold]markup[/bold] \x9b2J \u202egnp.exe a\rb \x08\x08
"""


def steps(text: str, is_thinking: bool, pause: float) -> Iterator[Step]:
    for at in range(0, len(text), 3):
        time.sleep(pause)
        yield Step(0, text[at : at + 3], is_thinking, None, Timings(1, 1, 0.1))


def main() -> None:
    pause = float(sys.argv[1])
    view = AnswerView(Screen())
    view.reading(0, 1000)
    view.reading(512, 1000)
    view.show(_answer(pause))
    print("END")
    time.sleep(600)


def _answer(pause: float) -> Iterator[Step]:
    yield from steps(REASONING, True, pause)
    yield from steps(ANSWER, False, pause)


if __name__ == "__main__":
    main()
