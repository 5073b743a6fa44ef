"""The ops: drop-in functions on tensors and lists of tensors. They import no transformers and no diffusers."""

from fastunlearn.ops._dense_buffer import release_buffers
from fastunlearn.ops.adamw import masked_adamw_, masked_grad_norm, masked_sgd_
from fastunlearn.ops.block_weight_grad import block_weight_grad, conv2d_block_weight_grad
from fastunlearn.ops.gram import gram
from fastunlearn.ops.hamu import Certificate, InfeasibleError, hamu_step_
from fastunlearn.ops.informax import informax, row_entropy
from fastunlearn.ops.linear_divergence import linear_divergence
from fastunlearn.ops.linear_nll import linear_nll
from fastunlearn.ops.mask import BitMask, load_masks, save_masks
from fastunlearn.ops.masked_lora import masked_lora_conv2d, masked_lora_linear, masked_lora_weight
from fastunlearn.ops.moments import token_moments
from fastunlearn.ops.nm import nm_mask
from fastunlearn.ops.nm_linear import nm_linear
from fastunlearn.ops.nm_tensor import NMTensor, nm_compress
from fastunlearn.ops.polar import Geodesic, bures_distance, bures_geodesic, polar
from fastunlearn.ops.redistribute import redistribution
from fastunlearn.ops.saliency import saliency_accumulate_
from fastunlearn.ops.sid import sid_loss
from fastunlearn.ops.spectral import SpectralTraces, spectral_solve, spectral_trace
from fastunlearn.ops.topk import topk_mask

__all__ = [
    "BitMask",
    "Certificate",
    "Geodesic",
    "InfeasibleError",
    "NMTensor",
    "SpectralTraces",
    "block_weight_grad",
    "bures_distance",
    "bures_geodesic",
    "conv2d_block_weight_grad",
    "gram",
    "hamu_step_",
    "informax",
    "linear_divergence",
    "linear_nll",
    "load_masks",
    "masked_adamw_",
    "masked_grad_norm",
    "masked_lora_conv2d",
    "masked_lora_linear",
    "masked_lora_weight",
    "masked_sgd_",
    "nm_compress",
    "nm_linear",
    "nm_mask",
    "polar",
    "redistribution",
    "release_buffers",
    "row_entropy",
    "saliency_accumulate_",
    "save_masks",
    "sid_loss",
    "spectral_solve",
    "spectral_trace",
    "token_moments",
    "topk_mask",
]
