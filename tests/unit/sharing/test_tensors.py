"""The content hash: the same for the same bytes, whatever the memory looks like."""

import threading

import pytest
import torch
import xxhash

from hogwild import tensors
from hogwild.tensors import BackgroundDigests, digest, layout_of, storage_key


def plain(tensor: torch.Tensor) -> str:
    """The obvious way."""
    return xxhash.xxh3_128(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("chunk", [64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_layout_hashes_like_its_row_major_bytes(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    base = (torch.randn(7, 12, 10) * 100).to(dtype)
    for view in (base, base.transpose(0, 2), base[2:5, 3:], base[:, :, ::3], base[0], base[1, 2, 3], base[:0],
                 base.permute(1, 2, 0)[1:, ::2], base.view(-1)):  # fmt: skip
        assert digest(view) == plain(view)


def test_one_bit_makes_another_hash() -> None:
    tensor = torch.zeros(1000)
    before = digest(tensor)
    tensor.view(torch.int32)[999] = 1
    assert digest(tensor) != before


def test_shape_does_not_count_only_bytes_do() -> None:
    tensor = torch.randn(6, 4)
    assert digest(tensor) == digest(tensor.view(24)) != digest(tensor.t())


def test_background_hashes_are_bounded_and_end() -> None:
    hashes = BackgroundDigests()
    values = [torch.full((1000,), float(i)) for i in range(50)]
    futures = [hashes.submit(value) for value in values]
    assert [future.result() for future in futures] == [digest(value) for value in values]
    hashes.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hogwild-digest")]


def test_a_failing_hash_fails_its_future_and_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = BackgroundDigests()
    monkeypatch.setattr(tensors, "digest", lambda tensor: 1 / 0)
    for _ in range(tensors.WAITING * 2):  # would block for ever if places were lost
        with pytest.raises(ZeroDivisionError):
            hashes.submit(torch.zeros(1)).result()
    hashes.close()


def test_storages_are_told_apart_and_views_are_not() -> None:
    a, b = torch.zeros(4), torch.zeros(4)
    assert storage_key(a) == storage_key(a[1:]) != storage_key(b)
    assert layout_of(a[1:3]).offset == 1
