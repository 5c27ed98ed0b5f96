"""Compiles the kernels of local attention for NVIDIA's GPUs, which takes none, and prints their shared memory.

python tests/compile_kernels.py HEAD_DIM
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from localdit.mixers import local_kernel_triton
from localdit.mixers.local_kernel_op import LAUNCH, prepare

KERNELS = ("attend_kernel", "query_gradient_kernel", "key_gradient_kernel")
EXACT = {"logarithm", "inner", "cosine", "sine"} | {f"of_{name}" for name in ("query_weight", "key_weight")}
EXACT |= {"of_context_key", "of_context_value"}
REAL = {"scale", "eps"}
STRIDES = {"batch_stride", "token_stride", "heads"}
NUMBERS = STRIDES | {"pooled", "height", "width", "side", "lead", "shift"}


def type_of(name: str, constants: dict) -> str:
    """The type of a kernel's argument in bf16, as Triton writes it."""
    if name in constants:
        return "constexpr"
    if name in NUMBERS:
        return "i32"
    return "fp32" if name in REAL else "*fp32" if name in EXACT else "*bf16"


def compile_for(capability: int, kernel, call) -> int:
    """The shared memory of a kernel, compiled as a launch would do for aligned tensors."""
    launch = dict(LAUNCH)
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    if capability >= 90 and "output" in kernel.arg_names and "gradient" not in kernel.arg_names:
        options["maxnreg"] = 128
    constants = call.constants | launch
    types = {argument: type_of(argument, constants) for argument in kernel.arg_names}
    given = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    aligned = [name for name, own in types.items() if own.startswith("*") or name in STRIDES]
    alignment = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, given, alignment)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


if __name__ == "__main__":
    head_dim = int(sys.argv[1])
    query = torch.empty(1, 4096, 16, head_dim, device="meta")
    weight, turns = torch.empty(head_dim, device="meta"), torch.empty(4096, 1, head_dim // 2, device="meta")
    call = prepare(query, weight, weight, None, None, turns, turns, 64, 64, 8, 4, True, 1e-6)
    for capability in (80, 90):
        for name in KERNELS:
            print(name, capability, compile_for(capability, getattr(local_kernel_triton, name), call))
