"""Compares the Triton kernels with the torch code on CPU tensors; run with TRITON_INTERPRET=1 by test_inplace.py."""

import torch
from torch import Tensor

from hogwild.gpu_worker import inplace, kernels
from hogwild.gpu_worker.optim import Apollo, ApolloMini, apollo

# Of the weight and of its gradient: those of several packs are summed in float32.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
BETAS, EPS, KEY = (0.9, 0.999), 1e-8, inplace.rounding_key(0, 3, "w")


def tensors(
    shape: tuple[int, int, int], dtype: torch.dtype, of_gradient: torch.dtype, *, transposed: bool
) -> tuple[Tensor, Tensor]:
    """A weight with odd strides and a gradient of its own layout."""
    b, m, n = shape
    base = torch.randn(b, n + 3, m + 2) if transposed else torch.randn(b, m + 3, n + 2)
    base = base.to(dtype)
    return (base[:, 1 : n + 1, :m].mT if transposed else base[:, 1 : m + 1, :n]), torch.randn(shape).to(of_gradient)


def compare(shape: tuple[int, int, int], dtype: torch.dtype, of_gradient: torch.dtype, *, transposed: bool) -> None:
    for good in (torch.tensor(True), torch.tensor(False)):
        p, g = tensors(shape, dtype, of_gradient, transposed=transposed)
        if not good:
            g[0, 0, 0] = float("nan")
        b, rows, columns = shape
        for c in (torch.rand(b, 1, columns), torch.rand(b, rows, 1), torch.rand(b, 1, 1), torch.rand(shape)):
            expected = p.clone()
            inplace.scaled_update_(expected, g.clone(), c * 1e-2, 1e-3, KEY, good)
            kernels.scaled_update_(p, g.clone(), c * 1e-2, 1e-3, KEY, good)
            # Bit for bit: the same float32 arithmetic, the same random bits.
            if not torch.equal(p, expected):
                raise SystemExit(f"scaled update differs: {shape} {dtype}")
        states = [(torch.rand(shape), torch.rand(shape)) for _ in range(1)]
        m, v = states[0]
        m2, v2 = m.clone(), v.clone()
        expected = p.clone()
        options = {"lr": 1e-3, "betas": BETAS, "eps": EPS, "decay": 1e-4, "key": KEY, "ok": good}
        inplace.adamw_update_(expected, g.clone(), m, v, torch.tensor(2.0), **options)  # type: ignore[arg-type]
        kernels.adamw_update_(p, g.clone(), m2, v2, torch.tensor(2.0), **options)
        # Bias corrections come from exp2 there and from a power here: the last bit may differ, in bf16 one place.
        torch.testing.assert_close(p, expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
        torch.testing.assert_close(m2, m)
        torch.testing.assert_close(v2, v)
        if not good and not (torch.equal(p, expected) and torch.equal(m, m2) and torch.equal(v, v2)):
            raise SystemExit("a bad gradient came through")


def compare_mini(shape: tuple[int, int, int], dtype: torch.dtype, *, transposed: bool) -> None:
    b, m, n = shape
    optimizer = ApolloMini()
    optimizer.steps = 1
    torch_state, kernel_state = (optimizer.new_state("w", torch.empty(shape)) for _ in range(2))
    for _ in range(3):
        g = torch.randn(b, n, m).to(dtype).mT if transposed else torch.randn(shape).to(dtype)
        expected = optimizer._coefficient(
            optimizer.projection("w", m, g) @ g.float(), optimizer._squares_of("w", g), torch_state, torch.tensor(True)
        )
        got, squares, ok = optimizer._kernel_coefficient("w", g, kernel_state, 0.5)
        torch.testing.assert_close(got, 0.5 * expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(squares, inplace.sum_of_squares(g), rtol=1e-4, atol=0)
        if not ok:
            raise SystemExit("a good gradient was refused")
    for key, value in torch_state.items():
        torch.testing.assert_close(kernel_state[key], value, rtol=1e-3, atol=1e-5)
    before = {k: t.clone() for k, t in kernel_state.items()}
    g[0, 1, 1] = float("inf")
    _, _, ok = optimizer._kernel_coefficient("w", g, kernel_state, 0.5)
    if ok or not all(torch.equal(t, kernel_state[k]) for k, t in before.items()):
        raise SystemExit("a bad gradient changed the state")


def compare_channels(
    shape: tuple[int, int, int], dtype: torch.dtype, of_gradient: torch.dtype, *, transposed: bool
) -> None:
    """Whole updates with a factor for each channel: APOLLO, and Mini's embeddings."""
    p, _ = tensors(shape, dtype, of_gradient, transposed=transposed)
    for make in (lambda: Apollo(rank=4), lambda: ApolloMini(token_params={"w"})):
        weights, states, squares = [p.clone(), p.clone()], [], []
        for by_kernels in (False, True):
            apollo.use_kernels = inplace.use_kernels = lambda _, chosen=by_kernels: chosen
            optimizer, generator = make(), torch.Generator().manual_seed(1)
            for poison in (False, False, False, True):
                g = torch.randn(shape, generator=generator).to(of_gradient)
                if poison:
                    g[0, -1, 1] = float("inf")
                    before = weights[by_kernels].clone(), {k: t.clone() for k, t in optimizer.state["w"].items()}
                optimizer.begin_step(1e-2)
                optimizer.step_param("w", weights[by_kernels], g)
                squares.append(optimizer.end_step())
            if not torch.equal(before[0], weights[by_kernels]):
                raise SystemExit("a bad gradient came through")
            if not all(torch.equal(t, before[1][k]) for k, t in optimizer.state["w"].items()):
                raise SystemExit("a bad gradient changed the state")
            states.append(optimizer.state["w"])
        for ours, theirs in zip(squares[:4], squares[4:], strict=True):
            if ours.nonfinite != theirs.nonfinite or abs(ours.grad_norm - theirs.grad_norm) > 1e-4 * ours.grad_norm:
                raise SystemExit(f"the steps' accounts differ: {ours}, {theirs}")
        # The order of sums differs: in bf16 a weight may be rounded to the neighbour.
        torch.testing.assert_close(*weights, rtol=1e-4 if dtype == torch.float32 else 1.6e-2, atol=1e-5)
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for kind in (torch.float32, torch.bfloat16):
        for transpose in (False, True):
            compare_mini((2, 17, 70), kind, transposed=transpose)
            compare_mini((1, 33, 70), kind, transposed=transpose)
    for kinds in DTYPES:
        compare((1, 37, 70), *kinds, transposed=False)
        compare((1, 37, 70), *kinds, transposed=True)
        compare((2, 9, 12), *kinds, transposed=False)
        compare((1, 1, 300), *kinds, transposed=False)
        for shape in ((1, 20, 70), (2, 40, 17), (1, 1, 70)):
            compare_channels(shape, *kinds, transposed=False)
            compare_channels(shape, *kinds, transposed=True)
    print("compared")
