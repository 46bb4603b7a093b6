"""What tokens cost: the work of a prompt's first token is 1."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.spec import AttentionKind, ModelSpec
from engine.scheduling.policy import Work

CACHED = 0.1  # found, not computed: it passes no expert, but takes memory and was kept for it
DECODE = 2.0  # a token alone uses weights that a chunk reads once for many


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Prices of tokens. What a token's weights cost, its experts' included, is 1 for each that is
    computed; attention adds to it with every position that the token looks back at.
    """

    per_position: float = 0.0  # of the whole context: global layers
    per_near_position: float = 0.0  # of the last `window` positions: sliding layers
    window: int = 1

    @staticmethod
    def from_spec(spec: ModelSpec) -> TokenCosts:
        """Prices in proportion to the multiplications that the model does for a token."""
        weights = sum(_layer_weights(spec, index) for index in range(spec.num_layers))
        looks = dict.fromkeys(AttentionKind, 0)
        for layer in spec.layers:  # a query times a key, and its weight times the value
            looks[layer.kind] += 2 * spec.num_attention_heads * layer.head_dim
        return TokenCosts(
            looks[AttentionKind.GLOBAL] / weights,
            looks[AttentionKind.SLIDING] / weights,
            spec.sliding_window,
        )

    def cost(self, work: Work, start: int, stop: int) -> float:
        """Of the positions [start, stop) of one request."""
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
    """Weights of a layer that one token is multiplied with: those of its experts only."""
    layer = spec.layers[index]
    queries = spec.num_attention_heads * layer.head_dim
    num_kv = (1 if layer.k_eq_v else 2) * layer.num_kv_heads * layer.head_dim
    attention = 2 * queries + (num_kv if layer.owns_kv else 0)
    mlp = 3 * layer.intermediate_size
    experts = 3 * spec.top_k_experts * spec.moe_intermediate_size + spec.num_experts
    return spec.hidden_size * (attention + mlp + experts)


def _sum_to(stop: int, window: int) -> int:
    """Positions that the tokens [0, stop) look back at, of at most the last `window` each."""
    whole = min(stop, window)
    return whole * (whole - 1) // 2 + max(0, stop - window) * window
