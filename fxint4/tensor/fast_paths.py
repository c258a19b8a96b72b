"""The fused ops of `torch.nn`'s fast paths in plain ops, in which the matmuls can be seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention_layer", "encoder_layer"]


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
    """`aten._transformer_encoder_layer_fwd` in plain ops, with the same arguments.

    src is ``[batch, length, embed_dim]``. A bool `mask` is True where attention does not look; a
    float mask is added to the scores, as documented (the op itself treats all but 0 as True). It is
    ``[length, length]`` for mask_type 0, ``[batch, length]`` for 1,
    ``[batch, heads, length, length]`` for 2.
    """

    def attention(x: Tensor) -> Tensor:
        q, k, v = _heads(x, num_heads, qkv_weight, qkv_bias)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(mask, mask_type, q.dtype))
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


def attention_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`aten._native_multi_head_attention` in plain ops, with the same arguments.

    query, key and value are one tensor ``[batch, length, embed_dim]``; `mask` is that of
    `encoder_layer`.

    Returns:
        The result, and the attention weights: ``[batch, length, length]`` if averaged, else
        ``[batch, heads, length, length]``; None if they are not needed.
    """
    q, k, v = _heads(query, num_heads, qkv_weight, qkv_bias)
    seen = _seen(mask, mask_type, q.dtype)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if seen is not None and seen.dtype is torch.bool:
        scores = scores.masked_fill(seen.logical_not(), float("-inf"))
    elif seen is not None:
        scores = scores + seen
    weights = scores.softmax(-1)
    result = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return result, None
    return result, weights.mean(1) if average_attn_weights else weights


def _heads(x: Tensor, heads: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, each ``[batch, heads, length, head size]``."""
    batch, length, size = x.shape
    parts = F.linear(x, weight, bias).view(batch, length, 3, heads, size // heads)
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


def _seen(mask: Tensor | None, mask_type: int | None, dtype: torch.dtype) -> Tensor | None:
    """The mask for attention: bool, True where it looks, or float, added to the scores."""
    if mask is None:
        return None
    seen = mask.logical_not() if mask.dtype is torch.bool else mask.to(dtype)
    return seen[:, None, None, :] if mask_type == 1 else seen
