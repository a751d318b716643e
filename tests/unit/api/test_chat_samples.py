"""The loss of a chat is taken on what the assistant said, and on nothing else."""

import asyncio
import json

import pytest

from hogwild.api.jsonl import parse
from hogwild.api.tokenizer import ExampleTokenizer, Limits, chat_samples, common, turn_of
from hogwild.errors import InvalidRequest

# A toy template: every message is one token of its role (1 system, 2 user, 3 assistant), its content, and 9 (end).
USER_A, ANSWER_A, USER_B, ANSWER_B = [2, 10, 9], [3, 20, 21, 9], [2, 11, 9], [3, 30, 9]


def as_tuple(sample):
    return list(sample.context_ids), list(sample.continuation_ids), sample.weights


def samples_of(turns, starts, ends, trained):
    found = [turn_of(ends[-1], start, end) for start, end in zip(starts, ends, strict=True)]
    return chat_samples(ends[-1], turns, found, trained)


def test_one_turn_is_context_and_answer():
    start, end = [*USER_A, 3], USER_A + ANSWER_A
    [sample] = samples_of([1], [start], [end], {1})
    assert as_tuple(sample) == ([2, 10, 9, 3], [20, 21, 9], None)


def test_several_turns_are_one_sample_with_weight_0_on_the_others():
    whole = USER_A + ANSWER_A + USER_B + ANSWER_B
    starts, ends = [[*USER_A, 3], [*USER_A, *ANSWER_A, *USER_B, 3]], [USER_A + ANSWER_A, whole]
    [sample] = samples_of([1, 3], starts, ends, {1, 3})
    context, continuation, weights = as_tuple(sample)
    assert context + continuation == whole
    learned = [token for token, weight in zip(continuation, weights, strict=True) if weight]
    assert learned == [20, 21, 9, 30, 9]
    assert set(weights) == {0.0, 1.0}


def test_turn_of_weight_0_is_context():
    whole = USER_A + ANSWER_A + USER_B + ANSWER_B
    starts, ends = [[*USER_A, 3], [*USER_A, *ANSWER_A, *USER_B, 3]], [USER_A + ANSWER_A, whole]
    [sample] = samples_of([1, 3], starts, ends, {3})
    assert as_tuple(sample) == (whole[:-2], [30, 9], None)


def test_template_that_rewrites_earlier_turns_makes_a_sample_of_each():
    # The template drops token 20 (say, reasoning) from answers that are not the last
    starts = [[*USER_A, 3], [*USER_A, 3, 21, 9, *USER_B, 3]]
    ends = [USER_A + ANSWER_A, [*USER_A, 3, 21, 9, *USER_B, *ANSWER_B]]
    first, second = samples_of([1, 3], starts, ends, {1, 3})
    assert as_tuple(first) == ([2, 10, 9, 3], [20, 21, 9], None)
    assert as_tuple(second) == ([2, 10, 9, 3, 21, 9, 2, 11, 9, 3], [30, 9], None)


def test_common_beginning():
    assert [common([1, 2], [1, 3]), common([1], [1, 2]), common([], [1]), common([2], [1])] == [1, 1, 0, 0]


class Toy(ExampleTokenizer):
    """One token a message; `rewrites`: the last message has a token more, which is gone once another follows."""

    def __init__(self, *, rewrites=False):
        self.rewrites, self.held, self.most = rewrites, 0, 0

    async def ids(self, line, body):
        self.held += len(body["messages"])
        self.most = max(self.most, self.held)
        await asyncio.sleep(0)
        self.held -= len(body["messages"])
        ids = list(range(len(body["messages"])))
        if body["add_generation_prompt"]:
            return ids
        return [*ids[:-1], 7, ids[-1]] if self.rewrites else ids


def conversation(messages):
    return parse(json.dumps({"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": "a"}
                                          for i in range(messages)]}).encode(), max_lines=9)


async def test_few_beginnings_of_a_long_conversation_are_held_at_once():
    toy = Toy()
    [(line, sample)] = await toy.samples(conversation(1000), Limits(1000, 0))
    assert line == 1 and [*sample.context_ids, *sample.continuation_ids] == list(range(1000))
    assert sample.weights == [1.0, 0.0] * 499 + [1.0]
    assert toy.most <= 8 * 1000


async def test_conversation_that_is_too_long_is_not_taken_apart():
    toy = Toy()
    [(_, sample)] = await toy.samples(conversation(1000), Limits(999, 0))
    assert len(sample.context_ids) + len(sample.continuation_ids) == 1000 and toy.most == 1000


async def test_turns_that_are_a_sample_each_may_not_come_to_too_much():
    found = await Toy(rewrites=True).samples(conversation(100), Limits(1000, 5000))
    assert len(found) == 50
    with pytest.raises(InvalidRequest, match=r"line 1: .*rewrites"):
        await Toy(rewrites=True).samples(conversation(1000), Limits(2000, 5000))
