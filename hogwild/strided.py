"""Integer arithmetic on strided layouts: which part of one tensor a view of another is.

A load is a sequence of "copy this piece of checkpoint tensor R to that place". The functions here turn one such copy
into a `Piece` (a box of R and the affine address it went to) and a set of pieces back into the one strided view that
shows all of R, when there is such a view. No torch, no names of models: shapes, strides and offsets only.

Units: sizes, strides, starts and offsets are in elements unless a name ends in `_bytes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod


@dataclass(frozen=True, slots=True)
class Layout:
    """A strided view of a storage."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def extent(self) -> int:
        """Elements of storage from the first to one past the last that the view touches; 0 when it is empty."""
        return span(self.shape, self.stride)

    @property
    def contiguous(self) -> bool:
        """Row-major without gaps."""
        return all(
            n == 1 or s == want for n, s, want in zip(self.shape, self.stride, row_major(self.shape), strict=True)
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a root tensor that lives at `offset + sum(i[d] * stride[d])` of some storage, i counted in the box.

    A stride is None where the box is one element long and so doesn't say.
    """

    start: tuple[int, ...]
    length: tuple[int, ...]
    offset: int
    stride: tuple[int | None, ...]


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements between the first and one past the last element of a view with non-negative strides."""
    if prod(shape) == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


Factor = tuple[int, int, int]  # (dimension of the base, step in it, how many)


def walk(base: Layout, view: Layout) -> tuple[tuple[int, ...], list[list[Factor]]] | None:
    """How `view` walks `base`, both on one storage: its first element's index in `base`, and factors per dimension.

    `base` is a tensor without overlaps; `view` any chain of narrow, select, transpose, permute, view, flatten on it.
    The factors of a view's dimension come innermost first: several when it is a flattened one. None: not within
    `base`, or a view of another kind.
    """
    dims = len(base.shape)
    order = sorted((d for d in range(dims) if base.shape[d] > 1), key=lambda d: -base.stride[d])
    start = [0] * dims
    rest = view.offset - base.offset
    if rest < 0 or view.numel == 0:
        return None
    for d in order:
        start[d], rest = divmod(rest, base.stride[d])
        if start[d] >= base.shape[d]:
            return None
    if rest:
        return None
    walked: list[list[Factor]] = []
    reach = list(start)  # the last index that is touched, per dimension
    for size, stride in zip(view.shape, view.stride, strict=True):
        factors: list[Factor] = []
        left, step = size, stride
        while left > 1:
            # The outermost dimension whose stride divides the step; a flattened one goes on in the next.
            fits = [d for d in order if step >= base.stride[d] and step % base.stride[d] == 0]
            if not fits:
                return None
            d = fits[0]
            k = step // base.stride[d]
            here = min(left, -(-(base.shape[d] - start[d]) // k))
            whole = start[d] == 0 and here * k == base.shape[d]
            if here == 1 or left % here or (here < left and not whole):
                return None
            factors.append((d, k, here))
            reach[d] += k * (here - 1)
            left //= here
            step *= here
        walked.append(factors)
    if any(reach[d] >= base.shape[d] for d in range(dims)):
        return None
    return tuple(start), walked


def locate(base: Layout, view: Layout, target: Layout) -> Piece | None:
    """The piece of `base` that `view` shows (see `walk`), addressed in `target` (same shape as `view`).

    None when it is no box of `base`, or when `target` puts the rows of a dimension in an order that a single stride per
    dimension can't express (interleaved heads, every second row, …).
    """
    found = walk(base, view)
    if found is None:
        return None
    start, walked = found
    dims = len(base.shape)
    placed: list[list[tuple[int, int, int]]] = [[] for _ in range(dims)]
    for factors, goes in zip(walked, target.stride, strict=True):
        if factors and goes <= 0:
            return None  # broadcast: one element in many places
        for d, k, size in factors:
            placed[d].append((k, size, goes))
            goes *= size
    length = [1] * dims
    stride: list[int | None] = [None] * dims
    for d in range(dims):
        for k, size, goes in sorted(placed[d]):
            known = stride[d]
            unit = goes if known is None else known
            if k != length[d] or goes != unit * k:
                return None
            stride[d] = unit
            length[d] *= size
    return Piece(start, tuple(length), target.offset, tuple(stride))


def carry(base: Layout, view: Layout, target: Layout) -> Layout | None:
    """Where `view` of `base` is after `base` was copied to `target` (same shape as `base`)."""
    found = walk(base, view)
    if found is None:
        return None
    start, walked = found
    strides: list[int] = []
    for factors, width in zip(walked, row_major(view.shape), strict=True):
        if not factors:
            strides.append(width)
            continue
        unit = factors[0][1] * target.stride[factors[0][0]]
        goes = unit
        for d, k, size in factors:
            if k * target.stride[d] != goes:
                return None
            goes *= size
        strides.append(unit)
    offset = target.offset + sum(a * s for a, s in zip(start, target.stride, strict=True))
    return Layout(offset, view.shape, tuple(strides))


@dataclass(frozen=True, slots=True)
class Fitted:
    """One strided view for a box of the root; `slices` is None when the box is the whole root."""

    layout: Layout
    slices: tuple[tuple[int, int, int], ...] | None


def fit(shape: Sequence[int], pieces: Sequence[Piece]) -> Fitted | None:
    """The strided view over all `pieces` (same storage) of a root of this shape, or None when none exists.

    The pieces must tile a box without gap or overlap, and one stride per dimension must explain every offset.
    """
    dims = len(shape)
    if not pieces:
        return None
    unique = list(dict.fromkeys(pieces))
    first = unique[0]
    stride: list[int | None] = [None] * dims
    for d in range(dims):
        said = {p.stride[d] for p in unique} - {None}
        if len(said) > 1:
            return None
        stride[d] = said.pop() if said else None

    progress = True
    while progress:  # a dimension that every piece is one long in gets its stride from how the offsets move
        progress = False
        for d in range(dims):
            if stride[d] is not None:
                continue
            for p in unique[1:]:
                moved = [e for e in range(dims) if p.start[e] != first.start[e]]
                if d in moved and all(stride[e] is not None for e in moved if e != d):
                    known = sum((p.start[e] - first.start[e]) * (stride[e] or 0) for e in moved if e != d)
                    step, odd = divmod(p.offset - first.offset - known, p.start[d] - first.start[d])
                    if odd or step <= 0:
                        return None
                    stride[d] = step
                    progress = True
                    break

    low = [min(p.start[d] for p in unique) for d in range(dims)]
    high = [max(p.start[d] + p.length[d] for p in unique) for d in range(dims)]
    box = [b - a for a, b in zip(low, high, strict=True)]
    cuts = [sorted({(p.start[d], p.length[d]) for p in unique}) for d in range(dims)]
    if prod(len(c) for c in cuts) != len(unique) or sum(prod(p.length) for p in unique) != prod(box):
        return None
    for c in cuts:
        if any(a + n != b for (a, n), (b, _) in pairwise(c)):
            return None
    if any(box[d] > 1 and stride[d] is None for d in range(dims)):
        return None
    filled = [s if s is not None else w for s, w in zip(stride, row_major(box), strict=True)]
    origin = first.offset - sum((first.start[d] - low[d]) * filled[d] for d in range(dims))
    if origin < 0 or any(
        p.offset != origin + sum((p.start[d] - low[d]) * filled[d] for d in range(dims)) for p in unique
    ):
        return None
    whole = tuple(box) == tuple(shape)
    slices = None if whole else tuple((d, low[d], box[d]) for d in range(dims) if box[d] != shape[d])
    return Fitted(Layout(origin, tuple(box), tuple(filled)), slices)
