"""Packed samples come back as they went in, and damage is noticed."""

import random

import pytest

from hogwild.errors import HogwildError
from hogwild.tasks.payloads import Sample, pack, unpack


def as_lists(samples):
    return [(list(s.context_ids), list(s.continuation_ids), None if s.weights is None else list(s.weights))
            for s in samples]


@pytest.mark.parametrize("seed", range(20))
def test_samples_survive_packing(seed):
    # Given samples of random lengths, some without context, some with weights
    rng = random.Random(seed)
    samples = []
    for _ in range(rng.randint(1, 30)):
        continuation = [rng.randrange(2**31) for _ in range(rng.randint(1, 20))]
        weights = [rng.randrange(8) / 4 for _ in continuation] if rng.random() < 0.5 else None
        samples.append(Sample([rng.randrange(1000) for _ in range(rng.randint(0, 20))], continuation, weights))
    # When they are packed and unpacked
    payload = pack(samples)
    # Then nothing changed, and the counts are right
    assert as_lists(unpack(payload.data)) == as_lists(samples)
    assert payload.samples == len(samples)
    assert payload.tokens == sum(len(s.context_ids) + len(s.continuation_ids) for s in samples)


def test_same_samples_have_the_same_hash_and_others_do_not():
    a = pack([Sample([1, 2], [3])])
    assert a.digest == pack([Sample((1, 2), (3,))]).digest
    assert a.digest != pack([Sample([1], [2, 3])]).digest
    assert a.digest != pack([Sample([1, 2], [3], [0.5])]).digest


def test_an_id_takes_four_bytes():
    assert len(pack([Sample([], list(range(100_000)))]).data) < 400_100


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b"XXXX" + d[4:], lambda d: b""])
def test_damaged_payload_is_refused(damage):
    data = pack([Sample([1, 2], [3, 4], [1.0, 0.0])]).data
    with pytest.raises(HogwildError, match="damaged"):
        unpack(damage(data))
