"""The loss of a chat is taken on what the assistant said, and on nothing else."""

from hogwild.api.tokenizer import chat_samples, common

# A toy template: every message is one token of its role (1 system, 2 user, 3 assistant), its content, and 9 (end).
USER_A, ANSWER_A, USER_B, ANSWER_B = [2, 10, 9], [3, 20, 21, 9], [2, 11, 9], [3, 30, 9]


def as_tuple(sample):
    return list(sample.context_ids), list(sample.continuation_ids), sample.weights


def test_one_turn_is_context_and_answer():
    start, end = [*USER_A, 3], USER_A + ANSWER_A
    [sample] = chat_samples([1], [start], [end], {1})
    assert as_tuple(sample) == ([2, 10, 9, 3], [20, 21, 9], None)


def test_several_turns_are_one_sample_with_weight_0_on_the_others():
    whole = USER_A + ANSWER_A + USER_B + ANSWER_B
    starts, ends = [[*USER_A, 3], [*USER_A, *ANSWER_A, *USER_B, 3]], [USER_A + ANSWER_A, whole]
    [sample] = chat_samples([1, 3], starts, ends, {1, 3})
    context, continuation, weights = as_tuple(sample)
    assert context + continuation == whole
    learned = [token for token, weight in zip(continuation, weights, strict=True) if weight]
    assert learned == [20, 21, 9, 30, 9]
    assert set(weights) == {0.0, 1.0}


def test_turn_of_weight_0_is_context():
    whole = USER_A + ANSWER_A + USER_B + ANSWER_B
    starts, ends = [[*USER_A, 3], [*USER_A, *ANSWER_A, *USER_B, 3]], [USER_A + ANSWER_A, whole]
    [sample] = chat_samples([1, 3], starts, ends, {3})
    assert as_tuple(sample) == (whole[:-2], [30, 9], None)


def test_template_that_rewrites_earlier_turns_makes_a_sample_of_each():
    # The template drops token 20 (say, reasoning) from answers that are not the last
    starts = [[*USER_A, 3], [*USER_A, 3, 21, 9, *USER_B, 3]]
    ends = [USER_A + ANSWER_A, [*USER_A, 3, 21, 9, *USER_B, *ANSWER_B]]
    first, second = chat_samples([1, 3], starts, ends, {1, 3})
    assert as_tuple(first) == ([2, 10, 9, 3], [20, 21, 9], None)
    assert as_tuple(second) == ([2, 10, 9, 3, 21, 9, 2, 11, 9, 3], [30, 9], None)


def test_common_beginning():
    assert [common([1, 2], [1, 3]), common([1], [1, 2]), common([], [1]), common([2], [1])] == [1, 1, 0, 0]
