"""What the Triton kernels share. Kernels live at the repository's root and are imported as `fastunlearn.kernels`.

A list of tensors is one launch: the kernel gets a table of addresses (int64 tensor) and casts an entry to a pointer.
"""

import torch
import triton
import triton.language as tl

#: major and minor version: what an older compiler cannot do is done another way
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

#: Triton whose compiler does float64 products, and float32 products of transposed tiles, for sm_100
ON_BLACKWELL = (3, 8)


def too_old(device: torch.device, what: str) -> dict[str, str]:
    """{"triton": why not}, or nothing: for what the compiler can do on sm_100 since ON_BLACKWELL."""
    if device.type != "cuda" or TRITON >= ON_BLACKWELL or torch.cuda.get_device_capability(device)[0] < 10:
        return {}
    since = ".".join(map(str, ON_BLACKWELL))
    return {
        "triton": f"Triton {triton.__version__} does not compile {what} for this GPU; {since} does: pip install -U triton"
    }


def tf32_allowed() -> bool:
    """Whether fp32 products may be TF32: by set_float32_matmul_precision, allow_tf32 or fp32_precision, whichever was set last.

    `allow_tf32` itself raises once `fp32_precision` was set to "tf32".
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


#: bytes of shared memory of one program on sm_90 and sm_100: what is assumed where there is no GPU to ask
SHARED_MEMORY = 227 * 1024


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have: 227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, 89 and 120."""
    if device.type != "cuda":
        return SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)


def stages(wanted: int, limit: int, once: int, each: int) -> int:
    """Stages of a loop that fit: `once` bytes and `each` a stage in `limit` bytes of shared memory; at least 1."""
    return max(1, min(wanted, (limit - once) // each))


#: element type of a torch tensor as a Triton type, for `tl.pointer_type(...)` casts of table entries
TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


@triton.jit
def set_bits(x):
    """Set bits of numbers below 256."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F
