"""Rendering chats: the forms that published templates take, and templates that are broken or hostile."""

import time

import pytest

from hybrid_rt import chat_template
from hybrid_rt.chat_template import ChatTemplate
from quant.errors import TokenizerError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "Hi!"}]

# As in R1's newer template, old reasoning is dropped and the generation prompt opens the thinking.
THINKING_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'system' %}{{ text }}
    {%- elif message.role == 'user' %}{{ '<User>' ~ text }}
    {%- elif message.role == 'assistant' %}{{ '<Assistant>' ~ text.split('</think>') | last ~ eos_token }}
    {%- else %}{{ raise_exception('there is no role ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"""


def render(source: str, messages=HELLO, **options) -> str:
    return ChatTemplate(source, TOKENS).render(messages, **options)


def test_template_that_opens_the_thinking():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>2"},
        {"role": "user", "content": "2+2?"},
    ]
    expected = "<s>Be brief.<User>1+1?<Assistant>2</s><User>2+2?"
    assert render(THINKING_TEMPLATE, messages) == expected + "<Assistant><think>\n"
    assert render(THINKING_TEMPLATE, messages, add_generation_prompt=False) == expected


def test_blocks_are_trimmed():
    assert render("{% if true %}\n  a\n    {% endif %}\nb\n") == "  a\nb"


def test_loop_controls_and_filters():
    source = (
        "{% for x in range(9) if x %}{% if x == 4 %}{% break %}{% endif %}{{ loop.index }}{{ x ~ ';' }}{% endfor %}"
    )
    assert render(source) == "11;22;33;"


def test_recursive_loops_and_macros():
    tree = "{% for x in [[1], [[2]]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}"
    assert render(tree) == "12"
    assert render("{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(1) %}in{% endcall %}") == "<1in>"


def test_block_assignment_keeps_its_filter():
    assert render("{% set x | upper %}ab{% endset %}{% set y %}{{ x }}!{% endset %}{{ y }}") == "AB!"


def test_tojson_does_not_escape():
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"


def test_date():
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_messages_stay_as_they_are():
    with pytest.raises(TokenizerError, match="fails on this conversation"):
        render("{{ messages.append(1) }}")


def test_refusal_is_told():
    with pytest.raises(TokenizerError, match="refuses this conversation: there is no role tool"):
        render(THINKING_TEMPLATE, [{"role": "tool", "content": "1"}])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x | nosuchfilter }}", "{% include 'x' %}", "{{ 1 / 0 }}", "{{ a.b.c }}"]
)
def test_broken_templates(source):
    with pytest.raises(TokenizerError):
        render(source)


def test_message_without_text():
    with pytest.raises(TokenizerError, match="every message has a role and a text"):
        render("{{ 'User: ' + messages[0].content }}", [{"role": "user", "content": None}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(TokenizerError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = t %}{% endfor %}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ ('a' * 1000000) * 1000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ lipsum(n=100000000) }}",
        "{% for i in range(99999) %}{{ 'abcdefghijklmnop' * 1000 }}{% endfor %}",
    ],
)
def test_bombs(monkeypatch, source):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(TokenizerError):
        render(source)
    assert time.monotonic() - started < 20


def test_long_conversations_are_no_bomb():
    messages = [{"role": "user", "content": "x" * 2000}] * 2000
    assert len(render(THINKING_TEMPLATE, messages)) > 4_000_000


def test_oversized_template():
    with pytest.raises(TokenizerError, match="at most"):
        ChatTemplate("x" * (2**20 + 1), {})


def test_same_as_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for source in (
        THINKING_TEMPLATE,
        " {% for m in messages %}\n {{- m | tojson }}\n {% endfor %}\n{{ eos_token }}\n\n",
    ):
        expected, _ = utils.render_jinja_template([HELLO], chat_template=source, add_generation_prompt=True, **TOKENS)
        assert render(source) == expected[0]
