"""Multi-head attention: the projections of query, key and value are linear ops by their own rows of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslayers.curvature import CurvatureRule
from bayeslayers.curvature.rows import LINEAR_ROWS, Rows
from bayeslayers.layers.base import BayesianLayer, Ops
from bayeslayers.layers.linear import BayesLinear
from bayeslayers.layers.scope import OUTSIDE, scope_for

_PROJECTIONS = ("q", "k", "v")


class _Appended(CurvatureRule):
    """A learned row `(1, 1, e)` behind the positions of each example's sequence `(n, s, e)`."""

    tensors = ("row",)

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: Any) -> Tensor:
        (x,), (row,) = inputs, tensors
        return torch.cat([x, row.expand(len(x), 1, row.shape[-1])], 1)


_APPENDED = _Appended()


class BayesMultiheadAttention(BayesianLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with a Gaussian posterior; takes what that takes, but for nested tensors.

    Its output projection is a `BayesLinear`. torch's fused inference path is not taken, for that reads the means.
    """

    rule = LINEAR_ROWS
    out_proj: nn.Linear

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        precisions = {key: kwargs[key] for key in ("prior_precision", "init_precision") if key in kwargs}
        ordinary = self.out_proj
        self.out_proj = BayesLinear(
            *(ordinary.in_features, ordinary.out_features, ordinary.bias is not None),
            **precisions,
            device=ordinary.weight.device,
            dtype=ordinary.weight.dtype,
        )
        with torch.no_grad():
            for key, parameter in ordinary.named_parameters():
                self.out_proj.get_parameter(key).copy_(parameter)

    @classmethod
    def ops(cls, layer: nn.Module) -> Ops:
        packed = layer._parameters.get("in_proj_weight") is not None
        found: dict[str, Any] = {
            f"{key}_proj": (LINEAR_ROWS, ("in_proj_weight" if packed else f"{key}_proj_weight", "in_proj_bias"))
            for key in _PROJECTIONS
        }
        for key in ("bias_k", "bias_v"):
            if layer._parameters.get(key) is not None:
                found[key] = _APPENDED, (key,)
        return found

    def _same_sizes(self) -> bool:
        """Return False once there is a posterior, which keeps torch's encoders from their fused path."""
        has_posterior = {"in_proj_weight_precision", "q_proj_weight_precision"} & self._buffers.keys()
        return not has_posterior and vars(self)["_qkv_same_embed_dim"]

    def _set_same_sizes(self, value: bool) -> None:
        vars(self)["_qkv_same_embed_dim"] = value

    _qkv_same_embed_dim = property(_same_sizes, _set_same_sizes)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested:
            raise ValueError(f"query must not be nested in a {type(self).__name__}, got a nested tensor. Pad it.")
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if scope_for(self) is OUTSIDE:
            return self._at_the_means(query, key, value, *options)
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask must be given where is_causal is set, got None.")
        rows, masks = (query, key, value), (key_padding_mask, attn_mask)
        if query.dim() == 2:  # a single example
            rows = tuple([x.unsqueeze(0) for x in rows])
            masks = None if key_padding_mask is None else key_padding_mask.unsqueeze(0), attn_mask
        elif not self.batch_first:
            rows = tuple([x.transpose(0, 1) for x in rows])
        output, weights = self._attend(rows, masks, need_weights, average_attn_weights)
        if query.dim() == 2:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _at_the_means(self, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the ordinary layer does."""
        key_padding_mask, need_weights, attn_mask, average, is_causal = options
        turned = self.batch_first and query.dim() == 3
        if turned:  # one tensor stays one, of which torch computes all projections at once
            rows = {id(x): x.transpose(0, 1) for x in (query, key, value)}
            query, key, value = (rows[id(x)] for x in (query, key, value))
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average,
            is_causal=is_causal,
        )
        return output.transpose(0, 1) if turned else output, weights

    def _attend(
        self,
        rows: tuple[Tensor, ...],
        masks: tuple[Tensor | None, Tensor | None],
        need_weights: bool,
        average: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and weights of the attention of `(n, l, e)` to `(n, s, e)`, with the weights of the scope."""
        q, k, v = (self._project(index, x) for index, x in enumerate(rows))
        extra = 0
        if self.bias_k is not None:
            k, v, extra = self.run("bias_k", k), self.run("bias_v", v), 1
        if self.add_zero_attn:
            k, v, extra = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), extra + 1
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(*masks, extra, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            heads = F.dropout(weights, dropout) @ v
        else:
            weights, heads = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(-2))
        return output, weights.mean(1) if weights is not None and average else weights

    def _project(self, index: int, x: Tensor) -> Tensor:
        packed = self.in_proj_weight is not None
        first = index * self.embed_dim
        return self.run(f"{_PROJECTIONS[index]}_proj", x, settings=Rows(first * packed, first, self.embed_dim))

    def _mask(self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, extra: int, q: Tensor) -> Tensor | None:
        """Return what is added to the scores `(n, heads, l, s)`, of which the last `extra` positions are open."""
        masks = []
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, q.dtype)
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            masks.append(_additive(key_padding_mask, q.dtype)[:, None, None, :])
        if not masks:
            return None
        return F.pad(masks[0] if len(masks) == 1 else masks[0] + masks[1], (0, extra))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores, from one that is True where no attention may go, or added already."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
