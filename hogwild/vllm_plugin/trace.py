"""Learning where each checkpoint tensor lands, by watching the copies of a load.

While vLLM loads its checkpoint, `LoadTrace` (a `TorchDispatchMode`) sees every operation of this thread. A checkpoint
tensor is announced with `seen`; from then on its storage is known. An operation that only re-arranges (view, narrow,
transpose, …) stays on that storage; an exact copy (`clone`, `contiguous`, a move to the GPU) makes another known
storage; anything else that reads a known storage makes its results *tainted*: values that come from the tensor but
are not it. A `copy_` into a parameter from a known storage is a landing: which box of the tensor went where.

A checkpoint tensor that is known to be in a parameter says nothing of what is made of that parameter: vLLM may compute
another tensor from it and serve that one. So it is also noted which storage was made of which, until the load's
post-processing is over.

Storages are told apart by the address of their StorageImpl, which a weak reference keeps from being used again. So
nothing is kept alive here: the trace costs no memory beyond its records.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild.strided import Layout, Piece, locate
from hogwild.tensors import layout_of, storage_key

aten = torch.ops.aten

# Copies that may change device and layout but no value, as long as the dtype stays.
EXACT_COPIES = frozenset(
    {
        aten.clone.default,
        aten._to_copy.default,
        aten.contiguous.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.alias_copy.default,
        aten._reshape_copy.default,
        aten._pin_memory.default,
    }
)


A_COPY = "a copy of it"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a known storage holds: the box `piece` of checkpoint tensor `name`, laid out as `base`.

    `base` has the tensor's dimensions in order. `changed` names the operation after which the values are others;
    `piece` is None when they are known to come from the tensor but not from which part.
    """

    name: str
    base: Layout
    piece: Piece | None
    dtype: torch.dtype
    changed: str | None = None


class Regions:
    """The origins that lie in one storage, by offset: a whole file in memory, or a parameter of many experts."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._origins: list[Origin] = []
        self._longest = 0  # extent of an origin

    def add(self, origin: Origin) -> None:
        """A later origin at the same offset goes before an earlier one."""
        self._longest = max(self._longest, origin.base.extent)
        at = bisect_right(self._offsets, origin.base.offset)
        self._offsets.insert(at, origin.base.offset)
        self._origins.insert(at, origin)

    def change(self, written: Layout, how: str) -> None:
        """Every origin that reaches into what was written, be it in part, doesn't hold its tensor any more."""
        first = bisect_right(self._offsets, written.offset - self._longest)
        for at in range(first, bisect_left(self._offsets, written.offset + written.extent)):
            origin = self._origins[at]
            if origin.changed is None and origin.base.offset + origin.base.extent > written.offset:
                self._origins[at] = replace(origin, piece=None, changed=how)

    def all(self) -> list[Origin]:
        """All origins."""
        return list(self._origins)

    def find(self, offset: int) -> Origin | None:
        """The origin that begins nearest before this element and reaches it."""
        for at in range(bisect_right(self._offsets, offset) - 1, -1, -1):
            if offset < self._offsets[at] + max(self._origins[at].base.extent, 1):
                return self._origins[at]
        return None


@dataclass(slots=True)
class Landing:
    """One copy of (a box of) checkpoint tensor `name` into the storage `storage` at `layout`."""

    name: str
    storage: int
    layout: Layout
    dtype: torch.dtype
    piece: Piece | None
    changed: str | None
    digest: Any = None  # a digest of the copied values, or a future of one; set by the caller's `on_landing`


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint tensor that passed by."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LoadTrace(TorchDispatchMode):
    """Use as a context manager around the load; call `seen` for each checkpoint tensor.

    With `loaded` called where post-processing begins, copies are no landings any more: whether contents were moved by
    then is found by comparing them. What is made of what is noted up to the end.

    `on_landing(landing, source)` is called with the copied values (a tensor of the landing's shape) for each landing
    that may turn out to be a faithful one, before the copy: what it needs later it must take there.
    """

    def __init__(self, on_landing: Callable[[Landing, torch.Tensor], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: dict[str, Seen] = {}
        self.landings: list[Landing] = []
        self.duplicates: set[str] = set()
        self._origins: dict[int, Regions] = {}
        self._made: dict[int, dict[int, str]] = {}  # storage → the storages it was made of, and how
        self._alive: dict[int, StorageWeakRef] = {}
        self._loading = True
        self._on_landing = on_landing
        self.failed: Exception | None = None  # an error of ours; the load itself goes on untraced

    def seen(self, name: str, tensor: torch.Tensor) -> None:
        """Announce a checkpoint tensor before vLLM gets it."""
        if name in self.tensors:
            self.duplicates.add(name)
        self.tensors[name] = Seen(tuple(tensor.shape), tensor.dtype)
        layout = layout_of(tensor)
        whole = Piece((0,) * tensor.dim(), layout.shape, 0, layout.stride)
        self._know(tensor, Origin(name, layout, whole, tensor.dtype))

    def loaded(self) -> None:
        """All checkpoint tensors have passed by; what follows is post-processing."""
        self._loading = False

    def made_of(self, tensor: torch.Tensor) -> dict[int, str]:
        """The storages that a tensor's storage was made of, over any number of steps, and how each was used."""
        found: dict[int, str] = {}
        todo = [storage_key(tensor)]
        while todo:
            for source, how in self._made.get(todo.pop(), {}).items():
                if source not in found:
                    found[source] = how
                    todo.append(source)
        return found

    def origins_of(self, tensor: torch.Tensor) -> list[Origin]:
        """What is known of a tensor's storage."""
        regions = self._origins.get(storage_key(tensor))
        return [] if regions is None else regions.all()

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it did to known storages."""
        if func is aten.copy_.default:
            self._guarded(self._copied, args[0], args[1])
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if self._origins:
            self._guarded(self._ran, func, args, kwargs or {}, result)
        return result

    def _guarded(self, note: Callable[..., None], *args: Any) -> None:
        """Whatever goes wrong in here is ours: it must not end vLLM's load."""
        if self.failed is None:
            try:
                note(*args)
            except Exception as error:
                self.failed = error

    def _know(self, tensor: torch.Tensor, origin: Origin) -> None:
        self._origins.setdefault(self._keep(tensor), Regions()).add(origin)

    def _keep(self, tensor: torch.Tensor) -> int:
        """The key of a tensor's storage, which from now on no other storage will have."""
        key = storage_key(tensor)
        if key not in self._alive:
            self._alive[key] = StorageWeakRef(tensor.untyped_storage())
        return key

    def _make(self, tensor: torch.Tensor, sources: Iterable[torch.Tensor], how: str) -> None:
        """Note that a tensor's storage now holds something made of those sources, where they are known."""
        for source in {storage_key(s) for s in sources} - {storage_key(tensor)}:
            if source in self._alive:
                self._made.setdefault(self._keep(tensor), {}).setdefault(source, how)

    def _find(self, tensor: torch.Tensor) -> Origin | None:
        """The origin of a tensor, when anything is known of its storage."""
        regions = self._origins.get(storage_key(tensor))
        return None if regions is None else regions.find(int(tensor.storage_offset()))

    def _box(self, origin: Origin, source: torch.Tensor, target: Layout) -> Piece | None:
        """Which box of the checkpoint tensor `source` is, addressed in `target`."""
        if origin.piece is None or origin.changed or source.dtype != origin.dtype:
            return None
        inner = locate(origin.base, layout_of(source), target)
        if inner is None:
            return None
        start = tuple(a + b for a, b in zip(origin.piece.start, inner.start, strict=True))
        return Piece(start, inner.length, inner.offset, inner.stride)

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        cast = source.dtype != target.dtype
        self._make(target, (source,), f"cast from {_short(source.dtype)} to {_short(target.dtype)}" if cast else A_COPY)
        origin = self._find(source) if self._loading else None
        if self._loading:
            self._mutated(target, "overwritten in place")
        if origin is None:
            return
        layout = layout_of(target)
        changed = origin.changed
        if changed is None and cast:
            changed = f"cast from {_short(source.dtype)} to {_short(target.dtype)}"
        if source.shape != target.shape:
            piece = None
            changed = changed or "broadcast"
        else:
            piece = None if changed else self._box(origin, source, layout)
        landing = Landing(origin.name, storage_key(target), layout, target.dtype, piece, changed)
        if piece is not None and self._on_landing is not None:
            self._on_landing(landing, source)
        self.landings.append(landing)
        # From here on the target's values come from the checkpoint tensor as well: a later copy to yet another place
        # (a parameter filled from a parameter) is found by that.
        if piece is not None:
            stride = tuple(s if s is not None else 1 for s in piece.stride)
            self._know(target, Origin(origin.name, Layout(layout.offset, piece.length, stride), piece, target.dtype))
        else:
            self._know(target, Origin(origin.name, layout, None, target.dtype, changed or "rearranged"))

    def _ran(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        read = list(tensors_in((args, kwargs)))
        keys = {storage_key(t) for t in read}
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                self._make(tensor, read, f"computed by {_name(func)}")
                if self._loading:
                    self._mutated(tensor, f"changed in place by {_name(func)}")
        outs = [out for out in tensors_in(result) if out.numel() and out.device.type != "meta"]
        outs = [out for out in outs if storage_key(out) not in keys]  # a view needs no note: it is on the same storage
        for out in outs if read else ():
            same = func in EXACT_COPIES and all(out.dtype == t.dtype for t in read)
            self._make(out, read, A_COPY if same else _describe(func, read[0], out))
        if not self._loading:
            return
        origins = [(t, o) for t in read if (o := self._find(t)) is not None] if outs else []
        if not origins:
            return
        source, origin = origins[0]
        for out in outs:
            exact = func in EXACT_COPIES and out.dtype == source.dtype and out.shape == source.shape
            piece = self._box(origin, source, layout_of(out)) if exact else None
            if piece is not None:
                stride = tuple(s if s is not None else 1 for s in piece.stride)
                self._know(
                    out, Origin(origin.name, Layout(layout_of(out).offset, piece.length, stride), piece, out.dtype)
                )
            elif exact and not origin.changed:
                self._know(out, Origin(origin.name, layout_of(out), None, out.dtype, "rearranged"))
            else:
                what = origin.changed or _describe(func, source, out)
                for name in dict.fromkeys(o.name for _, o in origins):
                    self._know(out, Origin(name, layout_of(out), None, out.dtype, what))

    def _mutated(self, out: torch.Tensor, how: str) -> None:
        """A storage was written in place: where it is known, it doesn't hold the tensor any more."""
        regions = self._origins.get(storage_key(out))
        if regions is not None and out.numel():
            regions.change(layout_of(out), how)


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    """The tensors in a value: itself, or those in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to, be they returned or not."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = tensors_in([named.get(name) for name in written])
    return [tensor for tensor in found if tensor.numel() and tensor.device.type != "meta"]


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(func: Any, source: torch.Tensor, out: torch.Tensor) -> str:
    if func in EXACT_COPIES and out.dtype != source.dtype:
        return f"cast from {_short(source.dtype)} to {_short(out.dtype)}"
    return f"computed by {_name(func)}"
