"""Take nn.TransformerEncoderLayer's fast path apart.

In eval mode the layer is one opaque op, chosen before the backend is asked, in which no pattern
could find the four matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxint4._torch import aten


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`aten._transformer_encoder_layer_fwd` in plain ops; arguments as there.

    src is [batch, length, embed_dim]. Where a bool `mask` is True, attention does not look; a float
    one is added to the scores, as the documentation has it (the op itself takes every number but 0
    for True). It is [length, length] for mask_type 0, [batch, length] for 1, [batch, heads, length,
    length] for 2.
    """

    def attention(x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, 3, num_heads, embed_dim // num_heads)
        q, k, v = F.linear(x, qkv_weight, qkv_bias).view(heads).permute(2, 0, 3, 1, 4).unbind(0)
        seen = None
        if mask is not None:
            seen = mask.logical_not() if mask.dtype is torch.bool else mask.to(q.dtype)
            if mask_type == 1:
                seen = seen[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        activation = F.gelu if use_gelu else F.relu
        return F.linear(activation(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))


#: What AOTAutograd takes apart for us while it traces.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
}
