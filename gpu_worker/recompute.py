"""Activation checkpointing, layer by layer: recompute what does not fit, keep what does.

A layer under checkpointing keeps only its input and runs a second time inside backward: a third more arithmetic for
roughly a tenth of the memory. So the number of layers that keep their activations follows the memory budget.

Our own wrapper instead of transformers' switch: that one drops the cache of a frozen context, and is all or nothing.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recompute:
    """Wraps the decoder layers of a model; `close` puts them back.

    Args:
        layers: in forward order; they draw no random numbers.
        compile_layers: run each layer through torch.compile where gradients are wanted (fuses norms, rotary embedding
            and activations). The layers share what was compiled.
    """

    def __init__(self, layers: Iterable[nn.Module], *, compile_layers: bool = False) -> None:
        self.layers = list(layers)
        self.compiles = compile_layers and bool(self.layers)
        self.eager = False
        """Leave out what is compiled: it holds for layers whose parameters are all trained, and without a cache."""
        self.kept = len(self.layers)
        """Layers, counted from the last, that keep their activations."""
        if self.compiles:
            import torch._inductor.config as inductor

            inductor.compile_threads = 1  # a handful of kernels: no pool of processes
        for i, layer in enumerate(self.layers):
            layer.forward = self._wrap(i, layer.forward)

    def _wrap(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        kept: Callable[..., Any] = forward
        recomputed: Callable[..., Any] = partial(_recomputed, forward)
        if self.compiles:
            # Rows have any length: symbolic shapes, or every new length would compile again.
            kept = torch.compile(forward, dynamic=True)
            # The checkpoint inside what is compiled: backward is then one graph, without what only the layer's output
            # needs (the last matrix product), and without Python's way through a checkpoint for each layer.
            recomputed = partial(torch.compile(_recomputed, dynamic=True), forward)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            keep = index >= len(self.layers) - self.kept
            if self.compiles and not self.eager:
                return (kept if keep else recomputed)(*args, **kwargs)
            return forward(*args, **kwargs) if keep else _recomputed(forward, *args, **kwargs)

        return run

    def close(self) -> None:
        """Give the layers their own forward back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a layer returns, keeping only its inputs for backward."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class ActivationMeter:
    """Counts the bytes that autograd keeps while it is entered, by layer: what checkpointing could save.

    Weights are not counted: they are there anyway.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.by_layer = [0] * len(layers)
        self.elsewhere = 0
        self._at: int | None = None
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._alive: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._handles: list[Any] = []

    def __enter__(self) -> "ActivationMeter":
        for i, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_pre_hook(lambda *_, i=i: self._move(i)))
            self._handles.append(layer.register_forward_hook(lambda *_: self._move(None)))
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self._alive.clear()

    def _move(self, to: int | None) -> None:
        self._at = to

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(t)  # so that its address can't be given to another tensor
            if self._at is None:
                self.elsewhere += storage.nbytes()
            else:
                self.by_layer[self._at] += storage.nbytes()
        return t.detach()  # `t` may be its operation's own output: kept as it is, neither would ever be freed
