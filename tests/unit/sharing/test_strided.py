"""The stride arithmetic against torch itself: what it says must show the very elements."""

from itertools import pairwise
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hogwild.strided import Layout, Piece, carry, fit, locate, row_major, span
from hogwild.tensors import layout_of

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@st.composite
def views(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor that numbers its elements, and a view made of it by random narrow, select, permute, reshape steps."""
    shape = draw(shapes)
    base = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = base
    for _ in range(draw(st.integers(0, 4))):
        step = draw(st.sampled_from(["narrow", "permute", "split", "flatten", "select", "stride"]))
        if view.dim() == 0:
            break
        dim = draw(st.integers(0, view.dim() - 1))
        if step == "narrow":
            start = draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
        elif step == "permute":
            view = view.permute(draw(st.permutations(range(view.dim()))))
        elif step == "split":
            divisors = [n for n in range(1, view.shape[dim] + 1) if view.shape[dim] % n == 0]
            view = view.unflatten(dim, (draw(st.sampled_from(divisors)), -1))
        elif step == "flatten" and dim + 1 < view.dim():
            if view.stride(dim) == view.shape[dim + 1] * view.stride(dim + 1):
                view = view.flatten(dim, dim + 1)
        elif step == "select" and view.dim() > 1:
            view = view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))
        elif step == "stride":
            view = view[(slice(None),) * dim + (slice(draw(st.integers(0, 1)), None, 2),)]
            assume(view.numel() > 0)
    return base, view


@st.composite
def placed(draw: Any, like: torch.Tensor) -> torch.Tensor:
    """A destination of that shape somewhere in a larger storage, rows padded, dimensions in any order."""
    order = draw(st.permutations(range(like.dim())))
    pad = draw(st.integers(0, 3))
    sizes = [like.shape[d] + pad for d in order]
    room = torch.full((pad + torch.Size(sizes).numel(),), -1)
    grid = room[pad:].view(sizes) if sizes else room[pad:][:1].view(())
    for axis, d in enumerate(order):
        grid = grid.narrow(axis, 0, like.shape[d])
    inverse = [order.index(d) for d in range(like.dim())]
    return grid.permute(inverse)


def show(storage: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The elements a layout shows of a storage (given by any tensor on it)."""
    return torch.as_strided(storage, layout.shape, layout.stride, layout.offset)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_located_piece_shows_the_box_it_names(data: Any) -> None:
    base, view = data.draw(views())
    target = data.draw(placed(view))
    target.copy_(view)

    piece = locate(layout_of(base), layout_of(view), layout_of(target))

    if piece is None:
        return
    stride = tuple(s if s is not None else 1 for s in piece.stride)
    box = base
    for d, (start, length) in enumerate(zip(piece.start, piece.length, strict=True)):
        box = box.narrow(d, start, length)
    assert box.numel() == view.numel()
    assert torch.equal(show(target, Layout(piece.offset, piece.length, stride)), box)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_vllms_loaders_do_is_always_located(data: Any) -> None:
    """narrow, select and transpose, in any order and number: never given up on."""
    shape = data.draw(shapes)
    base = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = base
    for _ in range(data.draw(st.integers(0, 4))):
        dim = data.draw(st.integers(0, view.dim() - 1))
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, data.draw(st.integers(1, view.shape[dim] - start)))
        else:
            view = view.transpose(dim, data.draw(st.integers(0, view.dim() - 1)))
    assert locate(layout_of(base), layout_of(view), layout_of(view.clone())) is not None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_carried_view_shows_the_same_elements_in_the_copy(data: Any) -> None:
    base, view = data.draw(views())
    target = data.draw(placed(base))
    target.copy_(base)

    layout = carry(layout_of(base), layout_of(view), layout_of(target))

    if layout is not None:
        assert torch.equal(show(target, layout), view)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_that_tile_a_tensor_are_fitted_and_others_never_wrongly(data: Any) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    root = torch.arange(torch.Size(shape).numel()).reshape(shape)
    home = data.draw(placed(root))
    cut_dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, shape[cut_dim] - 1)), max_size=3)))
    bounds = [0, *[c for c in cuts if c < shape[cut_dim]], shape[cut_dim]]
    pieces = []
    for a, b in pairwise(bounds):
        part, goes = root.narrow(cut_dim, a, b - a), home.narrow(cut_dim, a, b - a)
        goes.copy_(part)
        pieces.append(locate(layout_of(root), layout_of(part), layout_of(goes)))
    assert all(piece is not None for piece in pieces)
    order = data.draw(st.permutations(pieces))

    fitted = fit(shape, order)

    assert fitted is not None
    assert fitted.slices is None
    assert torch.equal(show(home, fitted.layout), root)

    if len(pieces) > 1:  # one piece missing: a part of the tensor, and said so, or nothing at all
        partial = fit(shape, order[1:])
        assert partial is None or partial.slices is not None
        moved = [Piece(p.start, p.length, p.offset + 1, p.stride) if i == 0 else p for i, p in enumerate(order)]
        other = fit(shape, moved)  # a strided view may still exist; if so it must put every piece where it is
        if other is not None:
            for p in moved:
                at = other.layout.offset + sum(a * s for a, s in zip(p.start, other.layout.stride, strict=True))
                assert at == p.offset


def test_experts_copied_one_by_one_become_one_view() -> None:
    # Given a fused tensor of 4 experts, copied expert by expert and transposed into another layout
    root = torch.arange(4 * 3 * 5).reshape(4, 3, 5)
    home = torch.zeros(4, 5, 8, dtype=torch.long)
    pieces = []
    for e in range(4):
        goes = home[e, :, 2:5]
        goes.copy_(root[e].t())
        pieces.append(locate(layout_of(root), layout_of(root[e].t()), layout_of(goes)))

    fitted = fit((4, 3, 5), [p for p in pieces if p is not None])

    assert fitted is not None
    assert torch.equal(show(home, fitted.layout), root)


def test_rows_interleaved_by_head_have_no_view() -> None:
    root = torch.arange(6 * 2).reshape(6, 2)
    view = root.view(2, 3, 2).transpose(0, 1)
    assert locate(layout_of(root), layout_of(view), layout_of(view.contiguous())) is None


def test_overlapping_pieces_are_refused() -> None:
    whole = Piece((0, 0), (4, 2), 0, (2, 1))
    half = Piece((0, 0), (2, 2), 0, (2, 1))
    assert fit((4, 2), [whole, half]) is None


def test_a_broadcast_is_no_piece() -> None:
    base = torch.arange(3)
    assert locate(layout_of(base), layout_of(base), Layout(0, (3,), (0,))) is None
    assert locate(Layout(0, (1, 3), (3, 1)), Layout(0, (4, 3), (0, 1)), Layout(0, (4, 3), (3, 1))) is None


def test_span_and_row_major_agree_with_torch() -> None:
    tensor = torch.empty(4, 3, 2)
    assert row_major((4, 3, 2)) == tensor.stride()
    assert span(tensor.shape, tensor.stride()) == tensor.numel()
    assert span((0, 3), (3, 1)) == 0
