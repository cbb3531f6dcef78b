"""What a kernel is called and where it belongs, for people who read tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

GROUPS = (
    "convolution",
    "matmul",
    "attention",
    "normalisation",
    "elementwise",
    "copies",
    "other",
    "optimizer + average",
)
FUSED = ("normalisation", "elementwise", "copies", "other")  # what a compiler can join into passes over the data
PRODUCTS = ("convolution", "matmul", "attention")

OUR_ATTENTION = "attention_avx512"  # the operation of models/attention_cpu.py

MATMULS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv", "dot"}
COPIES = {
    "copy_", "_to_copy", "clone", "cat", "stack", "fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like",
    "new_zeros", "new_full", "constant_pad_nd", "slice_backward", "select_backward", "index_select", "index", "repeat", "flip", "roll",
}  # fmt: skip
WORDS = {
    "native_group_norm": "group norm", "native_group_norm_backward": "group norm, backward", "native_layer_norm": "layer norm",
    "native_layer_norm_backward": "layer norm, backward", "gelu": "GELU", "gelu_backward": "GELU, backward", "silu": "SiLU",
    "silu_backward": "SiLU, backward", "max_pool2d_with_indices": "max pool",
    "max_pool2d_with_indices_backward": "max pool, backward", "upsample_bilinear2d": "bilinear upsampling",
    "upsample_bilinear2d_backward": "bilinear upsampling, backward", "copy_": "copy", "_to_copy": "copy", "clone": "copy",
    "_fused_adamw_": "fused AdamW", "_fused_adam_": "fused Adam", "_foreach_lerp_": "average: lerp", "_foreach_norm": "norms of the gradients",
    "__rshift__": "shift right", "__lshift__": "shift left",
}  # fmt: skip
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.uint8: "uint8", torch.int64: "int64",
          torch.bool: "bool", torch.int32: "int32"}  # fmt: skip


def group_of(function: OpOverload, updating: bool) -> str:
    """One of ``GROUPS``."""
    operation = function._schema.name.partition("::")[2]
    if updating or operation.startswith("_fused_adam"):
        return "optimizer + average"
    if "convolution" in operation:
        return "convolution"
    if "attention" in operation or "softmax" in operation:
        return "attention"
    if operation in MATMULS:
        return "matmul"
    if "_norm" in operation and "vector_norm" not in operation and not operation.startswith("_foreach"):
        return "normalisation"
    if operation in COPIES or operation.startswith("_foreach_copy"):
        return "copies"
    return "elementwise" if torch.Tag.pointwise in function.tags else "other"


def is_attention(operation: str) -> bool:
    """Forward or backward of the whole of it, as torch or we compute it."""
    return operation.startswith(("_scaled_dot_product", OUR_ATTENTION))


def name_of(operation: str, arguments: dict[str, Any], results: list[Tensor]) -> str:
    """Such as "conv3x3 64->128 at 32x32, backward"."""
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if operation in ("convolution", "convolution_backward"):
        return _convolution(operation, arguments, results)
    if operation.startswith("_scaled_dot_product"):
        batch, heads, tokens, width = arguments["query"].shape
        kind = operation.removeprefix("_scaled_dot_product_").removesuffix("_backward").removesuffix("_for_cpu")
        back = ", backward" if operation.endswith("_backward") else ""
        return f"{kind.replace('_', ' ')}, {tokens} tokens, {heads} heads of {width}{back}"
    if operation.startswith(OUR_ATTENTION):
        _, tokens, _, heads, width = arguments["qkv"].shape
        back = ", backward" if operation.endswith("_backward") else ""
        return f"avx512 attention, {tokens} tokens, {heads} heads of {width}{back}"
    if operation in MATMULS:
        factors = [tensor for tensor in given if tensor.dim() > 1][-2:]
        return f"product {' @ '.join(_shape(tensor.shape) for tensor in factors)}"
    word = WORDS.get(operation, operation.strip("_").replace("_", " "))
    lists = [value for value in arguments.values() if isinstance(value, (list, tuple)) and len(tree_leaves(value)) > 8]
    if lists and all(isinstance(leaf, Tensor) for leaf in lists[0]):
        return f"{word} of {len(lists[0])} tensors, {sum(tensor.numel() for tensor in lists[0]):,} numbers"
    largest = max([*results, *given], key=lambda tensor: tensor.numel())
    kinds = list(dict.fromkeys(DTYPES.get(tensor.dtype, str(tensor.dtype)) for tensor in [*given[:1], *results[:1]]))
    return f"{word} of {_shape(largest.shape)}, {' to '.join(kinds)}"


def _convolution(operation: str, arguments: dict[str, Any], results: list[Tensor]) -> str:
    weight, source = arguments["weight"], arguments["input"]
    out = results[0] if operation == "convolution" else arguments["grad_output"]
    kernel = "x".join(str(side) for side in weight.shape[2:])
    resolution = "x".join(str(side) for side in out.shape[2:])
    text = f"conv{kernel} {source.shape[1]}->{out.shape[1]} at {resolution}"
    if operation == "convolution":
        return text
    wanted = dict(zip(("input", "weights", "bias"), arguments["output_mask"], strict=True))
    back = [name for name, there in wanted.items() if there]
    return f"{text}, backward" + ("" if wanted["input"] and wanted["weights"] else f" of {' and '.join(back)}")


def _shape(shape: torch.Size) -> str:
    return "x".join(str(side) for side in shape) or "1 number"
