"""Attention for packed rows.

Transformers recognises samples side by side from positions that start again, and builds a block-diagonal mask for them.
That is right everywhere but slow on a GPU: a mask keeps SDPA off its flash kernels, and the blocks that it hides are
computed all the same. On CUDA torch's variable-length flash kernel gets the samples' boundaries instead and no mask
exists; sliding windows and cached contexts are the same kernel with other arguments.

It is registered with transformers' public attention interface under a name of ours. `Forward` tries it with its packing
probe, and goes back to SDPA with masks for a model that needs what the kernel lacks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "hogwild_packed"

# The flash kernel's own limit, in elements.
MAX_HEAD_DIM = 256

# Arguments of some models' attention that change its result and that the kernel doesn't know.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class Unsupported(Exception):
    """This model's attention needs something that the packed kernel lacks."""


def register() -> None:
    """Make the attention known to transformers; may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, packed_attention_forward)
    # As for other flash kernels: no mask unless there is padding, and there is none here.
    AttentionMaskInterface.register(NAME, flash_attention_mask)


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """The model with transformers' own attention: for batches with padding, and to generate."""
    packed = model.config._attn_implementation == NAME
    if packed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(NAME)


def boundaries(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments that tell the attention layers where the samples of a packed row are.

    The names are those of transformers' own flash attention: models hand them through to every layer, and a
    checkpointed layer gets them again when it is recomputed.
    """
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, Q, D)
    key: Tensor,  # (1, key heads, K, D)
    value: Tensor,  # (1, key heads, K, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of a row; returns (1, Q, heads, D).

    With more keys than queries (a cached context) the queries are the last ones.

    Raises:
        Unsupported: the layer asks for something that the kernel can't do.
    """
    odd = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal", True) is not False
    if odd or attention_mask is not None or dropout or not causal:
        raise Unsupported(f"{type(module).__name__} needs {odd or 'a mask, dropout or non-causal attention'}")
    queries, keys = query.shape[2], key.shape[2]
    if query.shape[0] != 1 or query.shape[-1] > MAX_HEAD_DIM or value.shape[-1] != query.shape[-1]:
        raise Unsupported(f"{type(module).__name__} has heads of {query.shape[-1]} and {value.shape[-1]}")
    if cu_seq_lens_q is None and queries == keys and sliding_window is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scaling, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.tensor([0, queries], dtype=torch.int32, device=query.device)
        cu_seq_lens_k = torch.tensor([0, keys], dtype=torch.int32, device=query.device)
        max_length_q, max_length_k = queries, keys
    # (left, right) of the window in keys; -1 is open. A window of w tokens counts the query's own.
    left = -1 if sliding_window is None else sliding_window - 1
    out = torch.ops.aten._flash_attention_forward(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        0.0, True, False, scale=scaling, window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip
    return out[None], None
