"""Compiles the kernels of local attention for NVIDIA's GPUs, which takes none, and prints their shared memory.

For the older of two GPUs as Triton compiles them where every number is 1, which it takes for a constant.
"""

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
NUMBERS = {"batch_stride", "token_stride", "heads", "pooled", "height", "width", "side", "lead", "shift"}


def type_of(name: str, constants: dict) -> str:
    """The type of a kernel's argument in bf16, as Triton writes it."""
    if name in constants:
        return "constexpr"
    if name in NUMBERS:
        return "i32"
    return "fp32" if name in REAL else "*fp32" if name in EXACT else "*bf16"


if __name__ == "__main__":
    query = torch.empty(1, 4096, 16, 72, device="meta")
    weight = torch.empty(72, device="meta")
    call = prepare(query, weight, weight, None, None, 64, 64, 8, 4, True, 10000.0, 1e-6)
    launch = dict(LAUNCH)
    options = {"num_warps": launch.pop("num_warps")}
    constants = call.constants | launch
    for capability, ones in ((80, NUMBERS), (90, set())):
        for name in KERNELS:
            kernel = getattr(local_kernel_triton, name)
            known = constants | dict.fromkeys(ones & set(kernel.arg_names), 1)
            types = {argument: type_of(argument, known) for argument in kernel.arg_names}
            given = {(kernel.arg_names.index(constant),): value for constant, value in known.items()}
            source = ASTSource(kernel, types, given)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            print(name, capability, compiled.metadata.shared)
