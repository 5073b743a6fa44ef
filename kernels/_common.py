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
