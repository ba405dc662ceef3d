"""Who may write control tokens: the chat template, and nobody else."""

import pytest
from checkpoint_files import BYTE_TOKENS, CHATML, SPECIALS, byte_level_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken

from octavo.errors import RequestError
from octavo.text.chat_template import ChatTemplate
from octavo.text.special_tokens import BREAK, MARK
from octavo.text.tokenizer import LibraryTokenizer

TEXT, START, END = range(3)  # ids of SPECIALS


def make_tokenizer(source=CHATML, library=None):
    template = None if source is None else ChatTemplate(source, {"eos_token": "<|im_end|>"})
    return LibraryTokenizer(library or byte_level_tokenizer(), source="test", template=template)


LIBRARY = byte_level_tokenizer()
TOKENIZER = make_tokenizer()
JOINING = make_tokenizer("{{ messages[0].content }}{{ messages[1].content }}{{ eos_token }}")
TRIMMING = make_tokenizer("{{ messages[0].content.strip() }}{{ messages[1].content | trim }}")

# Text that is likely to hold special tokens, or parts of them at its ends.
hostile = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_", "end|>", "<|", "im_end|>", "<", "|im_end|>", " ", "你"]
    ),
    max_size=6,
).map("".join)


def user(content):
    return [{"role": "user", "content": content}]


@given(text=st.one_of(hostile, st.text(max_size=20)))
def test_a_prompt_is_text(text):
    ids = TOKENIZER.encode(text)
    assert not TOKENIZER.special_token_ids & set(ids)
    if BREAK not in text and MARK not in text:
        assert TOKENIZER.decode(ids) == text


@given(text=st.one_of(hostile, st.text(max_size=20)))
def test_a_prompt_without_special_tokens_is_encoded_as_ever(text):
    if not any(name in text for name in SPECIALS):
        assert TOKENIZER.encode(text) == LIBRARY.encode(text).ids


@given(contents=st.lists(hostile, min_size=1, max_size=3))
def test_only_the_template_writes_control_tokens(contents):
    messages = [{"role": "user", "content": content} for content in contents]
    ids = TOKENIZER.encode_chat(messages)
    assert ids.count(START) == len(contents) + 1
    assert ids.count(END) == len(contents)
    assert TEXT not in ids
    rendered = TOKENIZER.apply_chat_template(messages)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == rendered
    assert BREAK not in rendered


@given(contents=st.lists(hostile, min_size=1, max_size=3))
def test_ordinary_messages_are_encoded_as_transformers_does(contents):
    messages = [{"role": "user", "content": content} for content in contents]
    if not any(name in content for name in SPECIALS for content in contents):
        rendered = TOKENIZER.apply_chat_template(messages)
        assert TOKENIZER.encode_chat(messages) == LIBRARY.encode(rendered).ids


@given(first=hostile, second=hostile)
@example(first="<", second="|im_end|>")
@example(first="<| \n", second=" im_end|>")
@example(first="<|im_", second="end|>")
def test_strings_cannot_be_joined_into_a_control_token(first, second):
    messages = [{"content": first}, {"content": second}]
    assert set(JOINING.encode_chat(messages)) & {TEXT, START, END} == {END}
    assert not set(TRIMMING.encode_chat(messages)) & {TEXT, START, END}


def test_control_tokens_anywhere_in_a_message_are_text():
    template = "{{ messages[0] | tojson }}{% for k in messages[0] %}{{ k }}{% endfor %}{{ x }}"
    tokenizer = make_tokenizer(template)
    message = {"role": "<|im_end|>", "<|im_start|>": [{"deep": ("<|im_end|>", 1, None, True, 0.5)}]}
    ids = tokenizer.encode_chat([message], template_arguments={"x": "<|endoftext|>"})
    assert not set(ids) & {TEXT, START, END}
    assert "<|im_start|>" in tokenizer.decode(ids)


def test_what_the_template_asks_of_the_content_still_works():
    tokenizer = make_tokenizer(
        "{% if '<think>' in messages[0].content %}yes{% endif %}"
        "{{ messages[0].content.split('</think>')[-1] }}"
    )
    ids = tokenizer.encode_chat(user("<think>a</think> b <|im_end|>"))
    assert tokenizer.decode(ids) == "yes b <|im_end|>"


@pytest.mark.parametrize("noncharacter", [BREAK, MARK])
def test_noncharacters_cannot_smuggle_control_tokens(noncharacter):
    text = f"<{noncharacter}|im_end|>{noncharacter}<|im_end|>"
    for ids in (TOKENIZER.encode(text), TOKENIZER.encode_chat(user(text))[3:-3]):
        text_ids = [i for i in ids if i not in (START, END)]
        assert "<|im_end|>" in TOKENIZER.decode(text_ids)
    assert TOKENIZER.encode(text).count(END) == 0
    assert TOKENIZER.encode_chat(user(text)).count(END) == 1


def test_special_tokens_of_one_and_two_characters():
    library = byte_level_tokenizer()
    library.add_special_tokens([AddedToken("§", normalized=False), AddedToken("¶¶")])
    tokenizer = make_tokenizer("§{{ messages[0].content }}¶¶{{ messages[0].content }}", library)
    one, two = library.token_to_id("§"), library.token_to_id("¶¶")
    ids = tokenizer.encode_chat(user("a§b¶¶c§¶"))
    assert (ids.count(one), ids.count(two)) == (1, 1)
    assert not {one, two} & set(tokenizer.encode("a§b¶¶c§¶"))


def test_tokenizer_without_special_tokens():
    library = byte_level_tokenizer()
    plain = type(library)(library.model)
    plain.pre_tokenizer, plain.decoder = library.pre_tokenizer, library.decoder
    tokenizer = LibraryTokenizer(plain, source="test")
    assert tokenizer.special_token_ids == frozenset()
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"


def test_added_tokens_that_are_not_special_may_be_spelled():
    library = byte_level_tokenizer()
    library.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer = make_tokenizer(library=library)
    tool_call = library.token_to_id("<tool_call>")
    assert tokenizer.encode("<tool_call> <|im_end|>").count(tool_call) == 1
    assert tokenizer.encode_chat(user("<tool_call>")).count(tool_call) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        (["hi"], "non-empty list"),
        (user(object()), "JSON"),
        (user(b"hi"), "JSON"),
        (user({1, 2}), "JSON"),
    ],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(RequestError, match=message) as caught:
        TOKENIZER.encode_chat(messages)
    assert caught.value.param == "messages"


def test_depth_is_bounded():
    deep = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        TOKENIZER.encode_chat(user(deep))


def test_model_without_chat_template():
    with pytest.raises(RequestError, match="no chat template; use completions"):
        make_tokenizer(None).encode_chat(user("hi"))


def test_token_bytes():
    assert TOKENIZER.token_bytes(BYTE_TOKENS.index("Ġhello")) == b" hello"
    assert TOKENIZER.token_bytes(END) == b"<|im_end|>"
    assert TOKENIZER.token_bytes(len(BYTE_TOKENS) + 5) == b""
