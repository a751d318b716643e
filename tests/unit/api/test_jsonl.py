"""Training files: what is taken, and how each kind of wrong line is named."""

import json

import pytest

from hogwild.api.jsonl import Chat, Completion, parse
from hogwild.errors import InvalidRequest

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def lines(*values):
    return "\n".join(v if isinstance(v, str) else json.dumps(v) for v in values).encode()


def test_chats_and_pairs_are_read():
    [chat] = parse(lines(GOOD), max_lines=9)
    assert isinstance(chat, Chat) and chat.trained == [1] and chat.line == 1
    [pair] = parse(lines({"prompt": "a", "completion": " b"}), max_lines=9)
    assert pair == Completion(1, "a", " b")


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_taken():
    content = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(GOOD).encode()
    assert [chat.line for chat in parse(content, max_lines=9)] == [1, 4]


def test_messages_of_weight_0_and_what_follows_the_last_learned_one_are_not_learned():
    [chat] = parse(lines({"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "1"},
        {"role": "assistant", "content": "bad", "weight": 0}, {"role": "user", "content": "2"},
        {"role": "assistant", "content": "good", "weight": 1}, {"role": "user", "content": "bye"}]}), max_lines=9)
    assert chat.trained == [4] and len(chat.messages) == 5
    assert all("weight" not in message for message in chat.messages)


def test_tools_may_be_nested_as_schemas_are():
    tools = json.loads("[" * 101 + "]" * 101)
    [chat] = parse(lines({**GOOD, "tools": tools}), max_lines=9)
    assert chat.tools == tools


def test_text_parts_are_joined():
    [chat] = parse(lines({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"}]}), max_lines=9)
    assert chat.messages[0]["content"] == "ab"


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not JSON"), ("[]", "not a JSON object"), ("7", "not a JSON object"), ("{}", "neither"),
    ("[" * 100_000, "nested too deeply"), ('{"prompt": ' + "1" * 5000 + "}", "number is too long"),
    *((f'{{"messages": [{{"role": "user", "content": "x"}}, {{"role": "assistant", "content": "y"}}], '
       f'"tools": {"[" * depth}{"]" * depth}}}', "nested too deeply") for depth in (102, 940, 980, 20_000)),
    ({"messages": []}, "not empty"), ({"messages": "x"}, "list"), ({"messages": [1]}, "not an object"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing to answer"),
    ({"messages": [{"role": "king", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user"}]}, "content is missing"),
    ({"messages": [{"role": "user", "content": 7}]}, "must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
    ({"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, "weight"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "surrogate"),
    ('{"messages": [{"role": "user", "content": "x", "n": NaN}, {"role": "assistant", "content": "x"}]}', "finite"),
    ({"prompt": "x"}, "completion"), ({"prompt": "x", "completion": ""}, "empty"),
    ({"prompt": 7, "completion": "x"}, "prompt must be"),
])
def test_wrong_line_is_named(line, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(lines(GOOD, line) if not (isinstance(line, dict) and "prompt" in line) else lines("", line), max_lines=9)
    assert caught.value.details["errors"][0]["line"] == 2


def test_bytes_that_are_no_text_are_named():
    with pytest.raises(InvalidRequest, match="line 1: is not UTF-8"):
        parse(b'{"messages": "\xff"}', max_lines=9)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_file_without_examples_is_refused(content):
    with pytest.raises(InvalidRequest, match="no examples"):
        parse(content, max_lines=9)


def test_mixed_kinds_and_too_many_lines_are_refused():
    with pytest.raises(InvalidRequest, match="mixed"):
        parse(lines(GOOD, {"prompt": "a", "completion": "b"}), max_lines=9)
    with pytest.raises(InvalidRequest, match="more than 2"):
        parse(lines(GOOD, GOOD, GOOD), max_lines=2)


def test_thousands_of_wrong_lines_make_a_short_answer():
    with pytest.raises(InvalidRequest) as caught:
        parse(b"x\n" * 5000, max_lines=10_000)
    assert len(caught.value.details["errors"]) == 20 and "4999 more" in caught.value.message
