"""Chat templates: what they may use, and what happens when they or their data are bad."""

import re

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.errors import CheckpointError, RequestError
from octavo.text.chat_template import MAX_RENDERED_CHARS, MAX_SOURCE_CHARS, ChatTemplate

USER = [{"role": "user", "content": "Hi <b> & 'you'"}]


def render(source, messages=USER, *, special_tokens=None, generate=False, **arguments):
    template = ChatTemplate(source, special_tokens or {})
    return template.render(messages, add_generation_prompt=generate, template_arguments=arguments)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content }}", "Hi <b> & 'you'"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b> & \'you\'"}'),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}",
            '{\n "a": 1,\n "b": "é"\n}',
        ),
        ("{% for m in messages %}\n    {% if true %}\nx\n{% endif %}\n{% endfor %}", "x\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in [1, 2] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "2"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{{ bos_token }}|{{ tools is none }}|{{ documents is none }}", "<s>|True|True"),
        ("{{ add_generation_prompt }}", "False"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
def test_what_templates_may_use(source, text):
    assert render(source, special_tokens={"bos_token": "<s>"}) == text


def test_generation_prompt_and_arguments():
    assert render("{{ add_generation_prompt }} {{ tools }} {{ x }}", generate=True, x=1) == (
        "True None 1"
    )


def test_strftime_now():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token", "range"])
def test_arguments_cannot_replace_what_the_server_sets(name):
    with pytest.raises(RequestError, match=name) as caught:
        ChatTemplate("", {"bos_token": "<s>"}).render(
            USER, add_generation_prompt=True, template_arguments={name: 1}
        )
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "refuses the messages: Roles must"),
        ("{{ messages[0].content.x.y }}", "refuses the messages: .*no attribute 'x'"),
        ("{{ messages[0].content + 1 }}", r"fails on these messages \(TypeError\)"),
        ("{{ 1 / 0 }}", r"\(ZeroDivisionError\)"),
        ("{{ messages.append(1) }}", r"\(SecurityError\)"),
        ("{{ messages.__class__.__mro__ }}", "refuses|SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses|SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "refuses|SecurityError"),
        ("{% for i in range(10000000) %}{% endfor %}", r"\(OverflowError\)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"\(RecursionError\)"),
        ("{% include 'x' %}", "TypeError|refuses|fails"),
    ],
)
def test_failures_are_the_requests(source, message):
    with pytest.raises(RequestError, match=message) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_output_is_bounded():
    source = "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(RequestError, match="too long"):
        render(source, [{"content": "x" * (MAX_RENDERED_CHARS // 1000)}])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% nonsense %}", "x" * (MAX_SOURCE_CHARS + 1)]
)
def test_templates_that_are_none(source):
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source, {})


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.contentTRIM }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize("text", ["The answer", " is ", "two\nlines\n", "Hi <b> & 'you'"])
def test_a_message_is_continued_as_transformers_does_it(trim, text):
    source = CHATML.replace("TRIM", trim)
    messages = [*USER, {"role": "assistant", "content": text}]
    [[expected], _] = render_jinja_template(
        conversations=[[dict(m) for m in messages]],
        chat_template=source,
        continue_final_message=True,
    )
    found = ChatTemplate(source, {}).render(
        messages,
        add_generation_prompt=False,
        template_arguments={},
        continue_final_message=True,
    )
    assert found == expected
    assert found.endswith(text.strip() if trim else text)
    assert messages[-1] == {"role": "assistant", "content": text}  # as it was


@pytest.mark.parametrize(
    ("source", "last", "cause"),
    [
        (CHATML.replace("TRIM", ""), {"role": "assistant", "content": " "}, "a text"),
        (CHATML.replace("TRIM", ""), {"role": "assistant"}, "a text"),
        ("{{ messages[0].content }}", {"role": "assistant", "content": "x"}, "leaves the last"),
    ],
)
def test_what_cannot_be_continued_is_refused(source, last, cause):
    with pytest.raises(RequestError, match=cause):
        ChatTemplate(source, {}).render(
            [*USER, last],
            add_generation_prompt=False,
            template_arguments={},
            continue_final_message=True,
        )
