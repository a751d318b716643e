"""Compiles the Triton kernels of the update for an H100, which takes no GPU; run by test_inplace.py."""

import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hogwild.gpu_worker import kernels
from hogwild.gpu_worker.inplace import MIX_1, MIX_2

POINTERS = {
    "p": "*bf16", "g": "*bf16", "c": "*fp32", "ok": "*i1", "first": "*fp32", "second": "*fp32", "step": "*fp32",
    "total": "*fp32", "projection": "*fp32", "squares": "*fp32", "dots": "*fp32", "norm": "*fp32",
    "coefficient": "*fp32",
}  # fmt: skip
FLOATS = {"decay", "lr", "rate", "beta1", "beta2", "eps", "growth"}
MIX = {"STOCHASTIC": True, "MIX_A": MIX_1, "MIX_B": MIX_2}
UPDATE = {"ROWS": 4, "COLS": 1024, **MIX}
rows = dict(zip(("ROWS", "COLS", "STAGES"), kernels.MEASURE_BY_ROWS, strict=False))
columns = dict(zip(("ROWS", "COLS", "STAGES"), kernels.MEASURE_BY_COLUMNS, strict=False))
KERNELS: list[tuple[Any, dict[str, Any], int]] = [
    (kernels._scaled_update, UPDATE | {"BY_ROW": True, "BY_COLUMN": False}, 8),
    (kernels._adamw_update, UPDATE, 8),
    (kernels._adamw_vector, {"BLOCK": kernels.VECTOR, **MIX}, 8),
    (kernels._measure, rows | {"PROJECT": True}, 4),
    (kernels._measure, columns | {"PROJECT": False}, 4),
    (kernels._mini_moments, {"BLOCK": 4096, "ALONE": True}, 8),
    (kernels._mini_moments, {"BLOCK": 4096, "ALONE": False}, 8),
]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for kernel, constants, warps in KERNELS:
        kinds = {
            name: "constexpr" if name in constants else POINTERS.get(name, "fp32" if name in FLOATS else "i32")
            for name in kernel.arg_names
        }
        kinds |= {key: "u32" for key in ("key_low", "key_high") if key in kinds}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        if len(made.asm["cubin"]) < 1000:
            raise SystemExit(f"{kernel.__name__}: nothing was compiled")
    print("compiled")
