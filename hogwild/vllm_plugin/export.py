"""From the trace of a load to the manifest: which live view shows which checkpoint tensor, compared bit for bit.

Runs once, after vLLM has loaded and post-processed a model and before it serves: the only moment when live weights and
checkpoint must be equal.
"""

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hogwild.errors import AttachRefused
from hogwild.manifest import Allocation, Status, TensorRecord
from hogwild.strided import Layout, fit
from hogwild.tensors import digest, hashers, layout_of, storage_key
from hogwild.vllm_plugin.arena import Arena
from hogwild.vllm_plugin.trace import A_COPY, Landing, LoadTrace, Seen, tensors_in

PROGRESS_S = 5.0  # how often a long comparison says where it is

Place = tuple[str, str]  # (module, name of its parameter)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A record without its address, and the live view when there is one."""

    record: TensorRecord
    view: torch.Tensor | None = None


def places_by_storage(model: torch.nn.Module) -> dict[int, list[Place]]:
    """Storage → the (module, parameter) names that hold it, taken before a load: post-processing may rebind them."""
    places: dict[int, list[Place]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type != "meta":
                places[storage_key(tensor)].append((name, key))
    return dict(places)


class _NotShared(Exception):
    """A checkpoint tensor has no faithful live view."""

    def __init__(self, status: Status, reason: str, parameter: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.parameter = status, reason, parameter


def resolve(
    model: torch.nn.Module,
    trace: LoadTrace,
    places: Mapping[int, list[Place]],
    layouts: Mapping[Place, Layout],
    logger: logging.Logger,
) -> dict[str, Resolved]:
    """For every checkpoint tensor that passed by: its live view if it has one, its status and, if not shared, why.

    `places`, `layouts`: where parameters were, and in which layout, when the trace began; parameters that were made
    since are looked up now. Must run in no_grad, and while the trace lives: its weak references keep the identity of a
    storage from being used again.
    """
    places = {**places_by_storage(model), **places}
    layouts = {**layouts_of(model), **layouts}
    landings: dict[str, list[Landing]] = defaultdict(list)
    for landing in trace.landings:
        landings[landing.name].append(landing)
    private, elsewhere = private_copies(model), _Elsewhere(model, trace)
    def one(name: str, seen: Seen) -> Resolved:
        try:
            if name in trace.duplicates:
                raise _NotShared("unequal", "is in the checkpoint more than once")
            live, label, group = _served(model, landings.get(name, []), places, layouts)
            if label in private:
                raise _NotShared("derived", private[label], label)
            if (other := elsewhere.find(name, live, group)) is not None:
                raise _NotShared("derived", f"vLLM serves it through {other}", label)
            return _compare(seen.shape, live, label, group, places, layouts)
        except _NotShared as error:
            record = TensorRecord(
                status=error.status,
                reason=error.reason,
                parameter=error.parameter,
                shape=seen.shape,
                full_shape=seen.shape,
                dtype=str(seen.dtype).removeprefix("torch."),
            )
            return Resolved(record=record)

    resolved: dict[str, Resolved] = {}
    started = said = time.monotonic()
    with hashers() as pool:
        for name, found in zip(trace.tensors, pool.map(one, trace.tensors, trace.tensors.values()), strict=True):
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                where = f"{len(resolved)} of {len(trace.tensors)} tensors, {said - started:.0f} s"
                logger.info("hogwild: comparing weights with the checkpoint: %s", where)
            resolved[name] = found
    return resolved


def _served(
    model: torch.nn.Module, landings: list[Landing], places: Mapping[int, list[Place]], layouts: Mapping[Place, Layout]
) -> tuple[torch.Tensor, str, list[Landing]]:
    """The one live tensor that a checkpoint tensor went into, its name, and the copies that brought it there."""
    if not landings:
        raise _NotShared("ignored", "vLLM read it and loaded it nowhere")
    served: dict[int, tuple[torch.Tensor, str, list[Landing]]] = {}  # by live storage
    lost: set[str] = set()
    for landing in landings:
        if landing.storage not in places:
            lost.add("a tensor that is no parameter")
        for place in places.get(landing.storage, ()):
            live, label = _live(model, place), ".".join(filter(None, place))
            if live is None or live.shape != layouts[place].shape:
                lost.add(f"{label}, which was replaced after loading")
                continue
            group = served.setdefault(storage_key(live), (live, label, []))[2]
            if all(landing is not other for other in group):
                group.append(landing)
    changed = sorted({landing.changed for _, _, group in served.values() for landing in group if landing.changed})
    names = ", ".join(sorted(label for _, label, _ in served.values()))
    if not served:
        ways = {landing.changed for landing in landings if landing.changed}
        raise _NotShared("derived", f"went into {', '.join(sorted(lost | ways))}")
    if changed:
        raise _NotShared("derived", f"{', '.join(changed)} while loading", names)
    if len(served) > 1:
        raise _NotShared("derived", f"is in several places: {names}", names)
    return next(iter(served.values()))


def _live(model: torch.nn.Module, place: Place) -> torch.Tensor | None:
    """The tensor that serves under this name now."""
    try:
        module = model.get_submodule(place[0])
    except AttributeError:
        return None
    parameter = module._parameters.get(place[1])
    return parameter if parameter is not None else module._buffers.get(place[1])


def _moved(
    live: torch.Tensor, landing: Landing, places: Mapping[int, list[Place]], layouts: Mapping[Place, Layout]
) -> int | None:
    """By how many elements a parameter's contents moved within its storage since the load; None: other strides."""
    if storage_key(live) == landing.storage:
        return 0
    for place in places[landing.storage]:
        before = layouts[place]
        if before.shape == tuple(live.shape) and before.stride == tuple(live.stride()):
            return layout_of(live).offset - before.offset
    return None


def _view(live: torch.Tensor, layout: Layout, moved: int) -> torch.Tensor | None:
    """A view of the storage of `live`, or None when it would reach beyond it."""
    offset = layout.offset + moved
    if offset < 0 or (offset + layout.extent) * live.element_size() > live.untyped_storage().nbytes():
        return None
    return live.detach().as_strided(layout.shape, layout.stride, offset)


def _compare(
    shape: tuple[int, ...],
    live: torch.Tensor,
    label: str,
    group: list[Landing],
    places: Mapping[int, list[Place]],
    layouts: Mapping[Place, Layout],
) -> Resolved:
    """The strided view of `live` that shows the checkpoint tensor, compared with it bit for bit.

    The comparison is by the hash that was taken of each copied piece when it passed by.
    """
    pieces = [landing.piece for landing in group if landing.piece is not None]
    fitted = fit(shape, pieces) if len(pieces) == len(group) else None
    if fitted is None:
        raise _NotShared("derived", "rearranged while loading: no strided view of the live memory has its shape", label)
    moved = _moved(live, group[0], places, layouts)
    view = None if moved is None else _view(live, fitted.layout, moved)
    if moved is None or view is None or view.dtype != group[0].dtype:
        raise _NotShared("unequal", "laid out anew after loading", label)
    for landing in group:
        piece = _view(live, landing.layout, moved)
        if piece is None or digest(piece) != landing.digest.result():
            raise _NotShared(
                "unequal",
                "the live contents are not the checkpoint's: permuted, packed or changed after loading",
                label,
            )
    # A tensor that came in one piece, in the checkpoint's own order of elements, has been hashed as a whole.
    same = len(group) == 1 and group[0].layout == fitted.layout
    whole = group[0].digest.result() if same else digest(view)
    record = TensorRecord(
        status="shared",
        shape=tuple(view.shape),
        stride=tuple(view.stride()),
        parameter=label,
        full_shape=shape,
        dtype=str(view.dtype).removeprefix("torch."),
        slices=fitted.slices,
        hash=whole,
    )
    return Resolved(record=record, view=view)


class _Elsewhere:
    """What the model holds that was made of checkpoint tensors or parameters, and isn't where they landed."""

    def __init__(self, model: torch.nn.Module, trace: LoadTrace) -> None:
        landed = {landing.storage for landing in trace.landings}
        self._by_source: dict[int, list[tuple[int, str]]] = defaultdict(list)  # storage → (storage made of it, what)
        self._by_name: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for label, tensor in _held(model):
            key = storage_key(tensor)
            for source, how in trace.made_of(tensor).items():
                self._by_source[source].append((key, f"{label}, {how}"))
            for origin in trace.origins_of(tensor) if key not in landed else ():
                self._by_name[origin.name].append((key, f"{label}, {origin.changed or A_COPY}"))

    def find(self, name: str, live: torch.Tensor, group: Sequence[Landing]) -> str | None:
        """Where else a checkpoint tensor with this live memory is served from, and what was done to it."""
        own = {storage_key(live), *(landing.storage for landing in group)}
        candidates = [entry for key in own for entry in self._by_source.get(key, ())] + self._by_name.get(name, [])
        return next((what for key, what in candidates if key not in own), None)


def _held(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module holds: parameters, buffers, plain attributes, and those of a plain object in one."""
    for name, module in model.named_modules():
        found = [*module._parameters.items(), *module._buffers.items()]
        for key, value in vars(module).items():
            if key in _MODULE_DICTS or isinstance(value, torch.nn.Module | type):
                continue
            found += [(key, tensor) for tensor in tensors_in(value)]
            for inner, held in getattr(value, "__dict__", {}).items():
                found += [(f"{key}.{inner}", tensor) for tensor in tensors_in(held)]
        for key, tensor in found:
            if tensor is not None and tensor.device.type != "meta" and tensor.layout == torch.strided:
                yield ".".join(filter(None, (name, key))), tensor


def private_copies(model: torch.nn.Module) -> dict[str, str]:
    """Parameters that may be served from a private copy made after loading: name → reason.

    A module that keeps, as a plain attribute, a floating tensor of at least two dimensions on a storage of its own, and
    that isn't empty scratch space, has computed something from the parameters in it (absorbed MLA projections, packed
    weights): writing to the parameter would not change what is served.
    """
    own = {storage_key(t) for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key not in _MODULE_DICTS}
        kept = [key for key, value in plain.items() if any(_computed(tensor, own) for tensor in tensors_in(value))]
        for attribute in kept:
            for parameter, _ in module.named_parameters():
                if parameter.count(".") <= 1:  # its own and its children's: deeper ones are served by their modules
                    where = ".".join(filter(None, (name, attribute)))
                    reason = f"vLLM serves it through {where}, a copy made after loading"
                    found[".".join(filter(None, (name, parameter)))] = reason
    return found


_MODULE_DICTS = ("_parameters", "_buffers", "_modules")


def _computed(tensor: torch.Tensor, own: set[int]) -> bool:
    """Whether a tensor that a module keeps may stand for weights: values, in two dimensions, on memory of its own."""
    if tensor.device.type == "meta" or not tensor.is_floating_point() or sum(n > 1 for n in tensor.shape) < 2:
        return False
    return storage_key(tensor) not in own and bool(tensor.any())


def layouts_of(model: torch.nn.Module) -> dict[Place, Layout]:
    """Layout of every parameter and buffer, by place."""
    return {
        (name, key): layout_of(tensor)
        for name, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.device.type != "meta"
    }


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The resolved tensors with addresses that another process can use."""

    device: Literal["cpu", "cuda"]
    gpu_uuid: str | None
    allocations: Sequence[Allocation]
    records: Mapping[str, TensorRecord]


def place(resolved: Mapping[str, Resolved], device: torch.device, arena: Arena | None) -> Memory:
    """Give each live view its allocation and offset."""
    records: dict[str, TensorRecord] = {}
    if device.type == "cpu":
        if arena is None:
            raise AttachRefused("the parameters are not in shared memory")
        for name, entry in resolved.items():
            offset = None if entry.view is None else arena.offset_of(entry.view.data_ptr())
            if entry.view is not None and offset is None:
                records[name] = _derived(
                    entry.record, "its live values are outside the shared memory: made or moved while loading"
                )
            else:
                records[name] = entry.record if offset is None else replace(entry.record, allocation=0, offset=offset)
        allocation = Allocation(kind="memfd", pid=os.getpid(), fd=arena.fd, inode=arena.inode, size=arena.size)
        return Memory(device="cpu", gpu_uuid=None, allocations=[allocation], records=records)
    from hogwild.vllm_plugin.cuda_export import CudaAllocations, gpu_uuid

    found = CudaAllocations()
    for name, entry in resolved.items():
        if entry.view is None:
            records[name] = entry.record
        elif entry.view.device.type != device.type:
            records[name] = _derived(entry.record, "its live values are in the host's memory, not on the GPU")
        else:
            index, offset = found.locate(entry.view)
            records[name] = replace(entry.record, allocation=index, offset=offset)
    return Memory(device="cuda", gpu_uuid=gpu_uuid(device), allocations=found.allocations, records=records)


def _derived(record: TensorRecord, reason: str) -> TensorRecord:
    """The record of a tensor whose live view another process can't be given."""
    return replace(record, status="derived", stride=(), hash=None, reason=reason)


def summary(records: Mapping[str, TensorRecord]) -> str:
    """One line for the log: how many tensors have which status."""
    counts = Counter(record.status for record in records.values())
    return ", ".join(
        f"{counts[status]} {status}" for status in ("shared", "derived", "unequal", "ignored") if counts[status]
    )
