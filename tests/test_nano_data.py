"""nano-r1's data: every spelled step is right, the split holds, the stream repeats."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from itertools import islice
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.nano_r1 import tokenizer
from tools.nano_r1.chat import ABILITIES, chat
from tools.nano_r1.mixture import example, long_conversation
from tools.nano_r1.serialize import Exchange, prompt_text, serialize, serialize_cut
from tools.nano_r1.stream import BLOCK, BUCKETS, batches
from tools.nano_r1.tasks import TASKS
from tools.nano_r1.tasks.compare import Comparison
from tools.nano_r1.tasks.count import Count
from tools.nano_r1.tasks.countdown import Countdown, search
from tools.nano_r1.tasks.words import english, train_word

COUNT = 2000


def samples(name: str, split: str = "train"):
    rng = Random(f"test {name}")
    for _ in range(COUNT):
        problem = TASKS[name].problem(split, rng, rng.random())
        yield problem, TASKS[name].thinking(problem)


def check_columns(text: str) -> None:
    """Every step `p+q+c=CD` of the text is right and takes its carry from the step before."""
    for line in text.splitlines():
        carry = "0"
        for p, sign, q, c, out, digit in re.findall(r"(\d)([-+*])(\d)[-+](\d)=(\d)(\d)", line):
            assert c == carry, line
            if sign == "-":
                assert int(p) - int(q) - int(c) == int(digit) - 10 * int(out), line
            else:
                value = int(p) * int(q) if sign == "*" else int(p) + int(q)
                assert value + int(c) == 10 * int(out) + int(digit), line
            carry = out


@pytest.mark.parametrize("name", TASKS)
def test_answers_check_out(name):
    task = TASKS[name]
    for problem, _ in samples(name):
        answer = task.answer(problem)
        assert task.check(problem, answer)
        assert task.check(problem, f"I think {answer[0].lower()}{answer[1:]}")
        assert not task.check(problem, "")


def test_addition_steps():
    for (a, b), text in samples("add"):
        check_columns(text)
        copied, head, _, total, answer = text.splitlines()
        assert copied == f"{a}+{b}"
        assert [int(x[::-1]) for x in head.split("+")] == [a, b]
        assert int(total[::-1]) == int(answer) == a + b


def test_subtraction_steps():
    for (a, b), text in samples("subtract"):
        check_columns(text)
        if a < b:
            first, text = text.split("\nswap\n")
            copied, turned, steps = first.splitlines()
            assert copied == f"{a}-{b}" and [int(x[::-1]) for x in turned.split("-")] == [a, b]
            assert steps[-2] == "1"  # a borrow that nothing pays
        copied, turned, _, rest, answer = text.splitlines()
        assert copied == f"{max(a, b)}-{min(a, b)}"
        assert [int(x[::-1]) for x in turned.split("-")] == [max(a, b), min(a, b)]
        assert int(rest[::-1]) == abs(a - b) and int(answer) == a - b


def test_multiplication_steps():
    for (a, b), text in samples("multiply"):
        check_columns(text)
        copied, *lines = text.splitlines()
        assert copied == f"{a}*{b}"
        assert [int(x[::-1]) for x in lines[0].split("*")] == [a, b]
        assert int(lines[-2][::-1]) == int(lines[-1]) == a * b
        rows = [n for n, line in enumerate(lines) if n and "*" in line]
        for shift, n in enumerate(rows):
            assert int(lines[n + 1][::-1]) == a * int(str(b)[-1 - shift]) * 10**shift
        for n, line in enumerate(lines):
            if re.fullmatch(r"\d+\+\d+", line):
                x, y = line.split("+")
                assert int(lines[n + 2][::-1]) == int(x[::-1]) + int(y[::-1])


def test_comparison_steps():
    for (a, b, ask), text in samples("compare"):
        copied, head, steps, end, verdict = text.splitlines()
        assert copied == f"{a} {b}"
        assert [Decimal(x) for x in head.split()] == [Decimal(a), Decimal(b)]
        for p, sign, q in re.findall(r"(\d)([<=>])(\d)", steps):
            assert sign == ("=" if p == q else "<" if p < q else ">")
        sign = "=" if Decimal(a) == Decimal(b) else "<" if Decimal(a) < Decimal(b) else ">"
        assert end == f"{a}{sign}{b}"
        asked, found = verdict.split("? ")
        low, high = sorted([a, b], key=Decimal)
        answers = {"larger": high, "smaller": low} if sign != "=" else {"larger": "equal", "smaller": "equal"}
        answers |= {"is larger": "yes" if sign == ">" else "no", "is smaller": "yes" if sign == "<" else "no"}
        assert asked == ask and found == answers[ask]


def test_count_spells_the_word():
    for (word, letter), text in samples("count"):
        head, spelled, times = text.splitlines()
        assert head == f"{word},{letter}"
        assert re.sub(r"\d", "", spelled) == word
        assert re.findall(r"(.)(\d+)", spelled) == [(letter, str(n + 1)) for n in range(word.count(letter))]
        assert int(times) == word.count(letter)


def brute_force(numbers, target) -> bool:
    """Whether any order, bracketing and signs reach the target."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, x in enumerate(numbers):
        for j, y in enumerate(numbers):
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            if i != j and any(brute_force([v, *rest], target) for v in (x + y, x - y, x * y)):
                return True
    return False


def test_countdown_search_is_right_and_complete():
    for problem, text in samples("countdown"):
        for x, sign, y, value in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)(?= |\n)", text):
            x, y = int(x), int(y)
            right = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign]
            assert right == int(value), text
        for x, y in re.findall(r"(\d+)/(\d+) no", text):
            assert int(x) % int(y)
        found = search(problem)[1] is not None
        assert found == brute_force(list(problem.numbers), problem.target)


@pytest.mark.parametrize("name", TASKS)
def test_split_is_disjoint(name):
    task = TASKS[name]
    tests = {task.canonical(p) for p in task.test_set(300)}
    assert tests.isdisjoint(task.canonical(p) for p, _ in samples(name))
    assert task.test_set(50) == task.test_set(50) != task.test_set(50, seed=1)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("multiply", (47, 36)),
        ("multiply", (36, 47)),
        ("compare", Comparison("9.11", "9.8", "larger")),
        ("compare", Comparison("9.8", "9.11", "is larger")),
        ("count", Count("strawberry", "r")),
        ("countdown", Countdown((7, 3, 12), 33)),
    ],
)
def test_known_questions_are_held_out(name, problem):
    assert TASKS[name].split(problem) == "test"


def test_tested_words_are_never_shown():
    rng = Random(3)
    assert len(english()[1]) > 800
    assert set(english()[1]).isdisjoint(train_word(rng) for _ in range(20_000))


def test_checkers_reject_wrong_answers():
    assert not TASKS["multiply"].check((47, 36), "47 * 36 = 1693")
    ask = Comparison("9.11", "9.8", "larger")
    assert not TASKS["compare"].check(ask, "9.11 is larger than 9.8")
    assert not TASKS["compare"].check(ask._replace(ask="is larger"), "Yes, 9.8 is larger than 9.11")
    countdown = Countdown((3, 7, 12), 33)
    assert TASKS["countdown"].check(countdown, "12 + 3 * 7 = 33")
    for wrong in ("12 + 21 = 33", "3 * 7 + 12 + 0 = 33", "7 * 12 - 3 = 33", "** = 33"):
        assert not TASKS["countdown"].check(countdown, wrong)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_tokenizer_round_trips(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_keeps_characters_apart():
    for text in ("0123456789", "strawberry", "47*36+1", "9.11"):
        assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.encode(tokenizer.BOS + tokenizer.EOS) == [0, 1]
    assert len(tokenizer.build().get_vocab()) == tokenizer.VOCAB_SIZE


def render(folder, messages: list[dict], opens: bool = True) -> str:
    import jinja2

    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    template = jinja2.Environment().from_string(config["chat_template"])
    return template.render(messages=messages, bos_token=config["bos_token"], add_generation_prompt=opens)


def test_chat_template_matches_the_training_format(tmp_path):
    tokenizer.save(tmp_path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\n2"},
        {"role": "user", "content": "and plus 5?"},
    ]
    expected = prompt_text("and plus 5?", "Be brief.", [("1+1", "\n\n2")])
    assert render(tmp_path, messages) == expected + "<think>\n"


def test_serialized_exchange_and_its_targets():
    exchange = Exchange("1+1", "1+1+0=02", "1 + 1 = 2", "I think 2")
    prompt = prompt_text("1+1")
    whole = serialize(exchange, prompt)
    reply = tokenizer.decode(whole.ids[whole.start :])
    assert reply == "<think>\n1+1+0=02\n</think>\n\n1 + 1 = 2<｜end▁of▁sentence｜>"
    assert tokenizer.encode(tokenizer.decode(whole.ids)) == whole.ids
    empty = serialize_cut(exchange, prompt)
    assert tokenizer.decode(empty.ids[: empty.start]) == prompt + "<think>\n\n</think>\n\n"
    assert tokenizer.decode(empty.ids[empty.start : -1]) == "I think 2"


def test_earlier_turns_have_no_thinking():
    rng = Random(9)
    for length in (2048, 2048, 4096):
        item = long_conversation(rng, 1.0, length)
        assert 0.9 * length < len(item.ids) <= length
        assert item.ids.count(tokenizer.THINK_ID) == item.ids.count(tokenizer.END_THINK_ID) == 1
    turns = []
    for _ in range(300):
        item = example(rng.choice(["add", "chat", "countdown"]), rng, 1.0)
        assert item.ids.count(tokenizer.THINK_ID) == item.ids.count(tokenizer.END_THINK_ID) == 1
        turns.append(item.ids[: item.start].count(tokenizer.USER_ID))
    assert 1 in turns and 2 in turns and max(turns) > 8


def test_small_talk_is_answered():
    answers = {chat(Random(n)).answer for n in range(200)}
    assert any(ABILITIES in answer for answer in answers)


@pytest.mark.parametrize("start", [0, 5, BLOCK - 1])
def test_stream_resumes(start):
    whole = list(islice(batches(7, 2048, 0.5), start + 2))[start:]
    resumed = list(islice(batches(7, 2048, 0.5, start=start), 2))
    for a, b in zip(whole, resumed, strict=True):
        assert a.step == b.step
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.loss_mask, b.loss_mask)


def test_stream_shapes_and_padding():
    run = list(islice(batches(1, 8192, lambda: 0.3), 120))
    for batch in run:
        rows, length = batch.ids.shape
        assert length in BUCKETS and rows * length <= 8192
        assert batch.loss_mask.any(axis=1).all()
        assert not batch.loss_mask[:, 0].any()
        assert not batch.loss_mask[batch.ids == tokenizer.PAD_ID].any()
        assert batch.ids.min() >= 0 and batch.ids.max() < tokenizer.VOCAB_SIZE
    padding = np.mean([np.mean(b.ids == tokenizer.PAD_ID) for b in run])
    assert padding < 0.15
