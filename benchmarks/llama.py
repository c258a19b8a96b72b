"""A Llama in plain PyTorch, with a cache of fixed size or, for whole sequences, without one.

Attention reads keys and values of a head once for all the heads of queries that share it, so that a
benchmark of decoding measures the linear layers rather than copies of the cache.

The cache holds as many tokens as the context and overwrites the oldest one: every step attends to a
whole context, no mask is needed, and no shape ever changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """The shape of a model; by default that of Llama-3-8B with 2,048 tokens of context."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    context: int = 2048
    rope_theta: float = 500000.0
    eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


class Cache(nn.Module):
    """Keys and values of one layer, ``[batch, kv_heads, context, head_size]``.

    The token at position p lies in slot p % context.
    """

    def __init__(self, config: Config, batch: int, like: Tensor) -> None:
        super().__init__()
        shape = (batch, config.kv_heads, config.context, config.head_size)
        self.register_buffer("keys", like.new_zeros(shape), persistent=False)
        self.register_buffer("values", like.new_zeros(shape), persistent=False)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight; computed in fp32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden))
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
        cache: Keys and values; None where every call has whole sequences.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q = nn.Linear(config.hidden, config.heads * config.head_size, bias=False)
        self.k = nn.Linear(config.hidden, config.kv_heads * config.head_size, bias=False)
        self.v = nn.Linear(config.hidden, config.kv_heads * config.head_size, bias=False)
        self.o = nn.Linear(config.heads * config.head_size, config.hidden, bias=False)
        self.cache: Cache | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.cache is not None:
            self.cache.write(slots, k, v)
            if x.shape[1] == 1:  # else a prompt, from position 0
                k, v = self.cache.keys, self.cache.values
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, slots)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """A Llama that returns the logits of the token after the last."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def use(self, caches: list[Cache]) -> None:
        """Set the caches, one for each layer, for later calls."""
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.attention.cache = cache

    def states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The input of the last norm, ``[batch, T, hidden]``; arguments as for `forward`."""
        config = self.config
        steps = torch.arange(0, config.head_size, 2, device=tokens.device) / config.head_size
        angles = positions[:, None] * config.rope_theta**-steps
        cos, sin = angles.cos(), angles.sin()
        slots = positions % config.context
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, slots)
        return x

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of the token that follows.

        Args:
            tokens: Int64 ``[batch, T]``: one each after a full context, or a prompt.
            positions: Int64 ``[T]``: the token's, or from 0 on; at most a context of them.

        Returns:
            ``[batch, vocabulary]``, in the model's dtype.
        """
        return self.lm_head(self.norm(self.states(tokens, positions)[:, -1]))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention without copies of keys and values.

    Args:
        q: ``[batch, heads, T, head_size]``.
        k: ``[batch, kv_heads, S, head_size]``.
        v: Shaped like k.
        mask: ``[batch, 1, T, S]``, boolean (True where a token attends) or added to the scores.
            Without one a single token attends to all S, and of several the i-th to the first i.

    Returns:
        Shaped like q.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
    # With a mask, torch's fused kernels may not take fewer heads of keys than of queries. The
    # queries that share a head of keys are rows of one head to them.
    shared = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (-1, shared)).flatten(2, 3)
    y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(1, 1, shared, 1))
    return y.unflatten(2, (shared, -1)).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of x ``[..., T, head_size]`` by angles ``[T, head_size/2]``."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
