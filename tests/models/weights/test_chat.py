"""Chat templates: what they may use, and how their mistakes are told."""

import datetime

import pytest

from models.errors import InputError
from models.weights.chat import render_chat

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
CHATML = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


def render(template, messages="Hi", *, add_generation_prompt=True, **special_tokens):
    return render_chat(template, messages, add_generation_prompt=add_generation_prompt, special_tokens=special_tokens)


def test_blocks_leave_no_white_space_behind():
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHATML, TURNS, add_generation_prompt=False) == expected
    assert render(CHATML, TURNS) == expected + "<|im_start|>assistant\n"


def test_indented_blocks_print_no_indentation():
    assert render("a\n    {% if true %}\nb\n    {% endif %}\nc") == "a\nb\nc"


def test_a_string_is_one_user_turn():
    assert render(CHATML, "Hi") == render(CHATML, [{"role": "user", "content": "Hi"}])


def test_special_tokens_are_printed_by_name_and_missing_ones_are_empty():
    assert render("{{ bos_token }}|{{ eos_token }}", bos_token="<s>") == "<s>|"


def test_tools_and_documents_are_defined_as_none():
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"


def test_loop_controls_and_generation_marks():
    template = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(template) == "01"
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}z") == "aHiz"


def test_tojson_keeps_letters_and_html():
    assert render("{{ {'k': messages[0].content} | tojson }}", "né <b>'&") == '{"k": "né <b>\'&"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'


def test_strftime_now_is_today():
    before = datetime.date.today().isoformat()
    seen = render("{{ strftime_now('%Y-%m-%d') }}")
    assert before <= seen <= datetime.date.today().isoformat()


def test_a_refusal_carries_the_templates_words():
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('system turn first, please') }}{% endif %}ok"
    assert render(template, TURNS) == "ok"
    with pytest.raises(InputError, match=r"roles \[user\].*system turn first, please"):
        render(template)


def test_syntax_errors_name_the_line():
    with pytest.raises(InputError, match=r"not valid Jinja.*line 2"):
        render("fine\n{% if %}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0].content + 1 }}",
        "{{ missing.attribute }}",
    ],
)
def test_foreign_code_stays_in_the_sandbox(template):
    with pytest.raises(InputError, match="chat template failed"):
        render(template)


def test_messages_of_the_caller_are_not_changed():
    turns = [dict(turn) for turn in TURNS]
    render("{% set messages = messages[1:] %}{{ messages | length }}", turns)
    assert turns == TURNS


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ({"role": "user", "content": "Hi"}, "at least one message"),
        (["Hi"], "message 0 of the chat is 'Hi'"),
        ([TURNS[0], {"role": "user"}], "message 1"),
        ([{"role": "user", "content": None}], "'role' and 'content'"),
    ],
)
def test_malformed_messages(messages, words):
    with pytest.raises(InputError, match=words):
        render(CHATML, messages)
