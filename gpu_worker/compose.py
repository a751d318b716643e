"""How a Hugging Face model is put together from the checkpoint's tensors: learned, not written down.

Transformers renames, stacks, concatenates, splits and transposes checkpoint tensors while it loads them, by rules of
its own for each model type. We let it do so with tensors on the meta device, which have shapes and strides but no
contents, and watch: a `TorchDispatchMode` follows views by their storage and notes for `cat`, `stack` and exact
copies which box of which checkpoint tensor went where. The result says for each parameter of which boxes it consists;
with the live address of each box that becomes one strided view on vLLM's memory, or a reason why there is none.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild.errors import AttachRefused
from hogwild.strided import Layout, Piece, carry, fit, locate, row_major, walk
from hogwild.tensors import layout_of, storage_key

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Region:
    """The box of checkpoint tensor `name` that begins at `start`; `layout` has the tensor's dimensions in order."""

    name: str
    start: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Live:
    """Where a checkpoint tensor lives: offset and strides in elements of `dtype` within an allocation."""

    allocation: int
    dtype: str
    layout: Layout

    def box(self, region: Region) -> Layout:
        """Live layout of a box of it."""
        offset = self.layout.offset + sum(a * s for a, s in zip(region.start, self.layout.stride, strict=True))
        return Layout(offset, region.layout.shape, self.layout.stride)


@dataclass(frozen=True, slots=True)
class Composition:
    """What a parameter consists of. `regions` is None when it was computed in a way that no view can show."""

    layout: Layout  # of the parameter in the storage that the regions lie in
    regions: tuple[Region, ...] | None

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint tensors in it."""
        return tuple(dict.fromkeys(region.name for region in self.regions or ()))

    def live(self, where: Mapping[str, Live]) -> Live | None:
        """The one strided view of live memory that shows the parameter, or None when there is none."""
        if not self.regions:
            return None
        homes = [where[region.name] for region in self.regions]
        if len({(home.allocation, home.dtype) for home in homes}) > 1:
            return None
        layout: Layout | None
        if len(self.regions) == 1 and walk(self.regions[0].layout, self.layout) is not None:
            layout = carry(self.regions[0].layout, self.layout, homes[0].box(self.regions[0]))
        else:
            pieces: list[Piece] = []
            for region, home in zip(self.regions, homes, strict=True):
                piece = locate(self.layout, region.layout, home.box(region))
                if piece is None:
                    return None
                pieces.append(piece)
            fitted = fit(self.layout.shape, pieces)
            layout = fitted.layout if fitted is not None and fitted.slices is None else None
        return None if layout is None else Live(homes[0].allocation, homes[0].dtype, layout)


class _Follow(TorchDispatchMode):
    """Notes for every storage which boxes of which probes lie in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.regions: dict[int, list[Region]] = {}
        self._keep: list[torch.Tensor] = []  # a storage that is freed could come back as another one

    def probe(self, name: str, tensor: torch.Tensor) -> None:
        layout = layout_of(tensor)
        self._add(tensor, [Region(name, (0,) * tensor.dim(), layout)])

    def of(self, tensor: torch.Tensor) -> Composition | None:
        """The composition of a tensor; None when nothing is known of its storage."""
        regions = self.regions.get(storage_key(tensor))
        if regions is None:
            return None
        layout = layout_of(tensor)
        inside = _shown(regions, layout)
        return Composition(layout, None if inside is None else tuple(inside))

    def _add(self, tensor: torch.Tensor, regions: list[Region]) -> None:
        self.regions.setdefault(storage_key(tensor), []).extend(regions)
        self._keep.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (aten.cat.default, aten.stack.default):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self._joined(args[0], result, dim % result.dim(), stack=func is aten.stack.default)
        elif func in (aten.clone.default, aten._to_copy.default) and result.dtype == args[0].dtype:
            self._copied(args[0], result)
        return result

    def _joined(self, parts: Iterable[torch.Tensor], result: torch.Tensor, dim: int, *, stack: bool) -> None:
        at = 0
        for part in parts:
            if stack:
                self._copied(part, result.select(dim, at))
                at += 1
            else:
                self._copied(part, result.narrow(dim, at, part.shape[dim]))
                at += part.shape[dim]

    def _copied(self, source: torch.Tensor, target: torch.Tensor) -> None:
        regions = self.regions.get(storage_key(source))
        if regions is None:
            return
        view, goes = layout_of(source), layout_of(target)
        moved: list[Region] = []
        for region in _shown(regions, view) or ():
            layout = carry(view, region.layout, goes)
            if layout is not None:
                moved.append(Region(region.name, region.start, layout))
        self._add(target, moved)


def _shown(regions: list[Region], view: Layout) -> list[Region] | None:
    """The regions, or the part of one, that `view` shows; None when they don't explain all of it."""
    for region in regions:
        piece = locate(region.layout, view, view)
        if piece is not None:
            stride = tuple(
                s if s is not None else w for s, w in zip(piece.stride, row_major(piece.length), strict=True)
            )
            start = tuple(a + b for a, b in zip(region.start, piece.start, strict=True))
            return [Region(region.name, start, Layout(view.offset, piece.length, stride))]
    inside = [region for region in regions if walk(view, region.layout) is not None]
    return inside if sum(region.layout.numel for region in inside) == view.numel else None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What transformers would make of a checkpoint. `parts`: parameter or buffer name → composition.

    `missing`: names the checkpoint doesn't fill. `unused`: checkpoint tensors the model doesn't have.
    """

    parts: Mapping[str, Composition | None]
    missing: frozenset[str]
    unused: frozenset[str]


def learn(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Recipe:
    """Let transformers load probes of these shapes into `model` (a PreTrainedModel whose parameters are on meta).

    Raises:
        AttachRefused: this transformers works differently, or can't load such a checkpoint.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError as error:
        raise AttachRefused(
            f"this version of transformers loads models in another way ({error}): use 5.16 to 5.19"
        ) from error
    dtype = torch.get_default_dtype()
    with torch.no_grad():
        for parameter in model.parameters():  # one dtype for all, so that no cast hides what a probe is
            parameter.data = parameter.data.to(dtype)
    follow = _Follow()
    probes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    for name, probe in probes.items():
        follow.probe(name, probe)
    config = LoadStateDictConfig(
        device_map={"": "meta"}, dtype=None, weight_mapping=get_model_conversion_mapping(model)
    )
    with _in_this_thread(), _quietly(), follow:
        info, _ = convert_and_load_state_dict_in_model(model, probes, config)
    if info.conversion_errors:
        name, text = next(iter(info.conversion_errors.items()))
        raise AttachRefused(f"transformers can't build {name} from this checkpoint: {text.strip().splitlines()[-1]}")
    if info.mismatched_keys:
        name, found, wanted = sorted(info.mismatched_keys)[0]
        raise AttachRefused(
            f"{name} is {tuple(found)} in the checkpoint but {tuple(wanted)} in the model: does the "
            f"checkpoint's config.json belong to it?"
        )
    filled = {name: tensor for name, tensor in _state(model) if name not in info.missing_keys}
    return Recipe(
        parts={name: follow.of(tensor) for name, tensor in filled.items()},
        missing=frozenset(info.missing_keys),
        unused=frozenset(info.unexpected_keys),
    )


def _state(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict(keep_vars=True).items()


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar for a load of nothing."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _in_this_thread() -> Iterator[None]:
    """A dispatch mode sees its own thread only: transformers must not load in a pool."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
