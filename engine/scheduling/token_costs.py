"""TokenCosts: prices of tokens, in the work of a prompt's first token."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.spec import AttentionKind, ModelSpec
from engine.scheduling.policy import Work

CACHED = 0.1  # a cached token passes no expert, but it took memory until now
DECODE = 2.0  # a decoded token reads weights alone that a chunk reads once for many tokens


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Prices of tokens: 1 for the multiplications with weights, and attention's on top.

    Attention costs more with every position that a token attends to.
    """

    per_position: float = 0.0  # in global layers, for each position of the context
    per_near_position: float = 0.0  # in sliding layers, for each of the last `window` positions
    window: int = 1

    @staticmethod
    def from_spec(spec: ModelSpec) -> TokenCosts:
        """Derive the prices from the numbers of multiplications that the model does for a token."""
        weights = sum(_layer_weights(spec, index) for index in range(spec.num_layers))
        attended = dict.fromkeys(AttentionKind, 0)
        for layer in spec.layers:  # a query times a key, and its weight times the value
            attended[layer.kind] += 2 * spec.num_attention_heads * layer.head_dim
        return TokenCosts(
            attended[AttentionKind.GLOBAL] / weights,
            attended[AttentionKind.SLIDING] / weights,
            spec.sliding_window,
        )

    def cost(self, work: Work, start: int, stop: int) -> float:
        """Return the cost of the positions [start, stop) of one request."""
        num_tokens = stop - start
        if work is Work.CACHED:
            return CACHED * num_tokens
        base = (DECODE if work is Work.DECODE else 1.0) * num_tokens
        near = _sum_to(stop, self.window) - _sum_to(start, self.window)
        return (
            base
            + self.per_position * (_sum_to(stop, stop) - _sum_to(start, start))
            + self.per_near_position * near
        )


def _layer_weights(spec: ModelSpec, index: int) -> int:
    """Count a layer's weights that one token is multiplied with; of the experts, its top k."""
    layer = spec.layers[index]
    queries = spec.num_attention_heads * layer.head_dim
    num_kv = (1 if layer.k_eq_v else 2) * layer.num_kv_heads * layer.head_dim
    attention = 2 * queries + (num_kv if layer.owns_kv else 0)
    mlp = 3 * layer.intermediate_size
    experts = 3 * spec.top_k_experts * spec.moe_intermediate_size + spec.num_experts
    return spec.hidden_size * (attention + mlp + experts)


def _sum_to(stop: int, window: int) -> int:
    """Count the positions that the tokens [0, stop) attend to, at most the last `window` each."""
    whole = min(stop, window)
    return whole * (whole - 1) // 2 + max(0, stop - window) * window
