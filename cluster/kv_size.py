"""How large a context's KV is, from the model's geometry: what a session takes in Redis."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.spec import AttentionKind, LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class KVSize:
    """Payload bytes of one context. `window_bytes` is one checkpoint of the sliding layers."""

    global_bytes: int
    window_bytes: int

    @property
    def num_bytes(self) -> int:
        """With one checkpoint, the least that a context can be resumed from."""
        return self.global_bytes + self.window_bytes


def kv_size(
    spec: ModelSpec, num_tokens: int, element_bytes: int = 2, *, one_row: bool = True
) -> KVSize:
    """The KV of `num_tokens` tokens. With `one_row`, global layers in which K comes from V hold V
    alone. Layers that read another layer's KV hold nothing.
    """
    owners = [layer for layer in spec.layers if layer.owns_kv]

    def row_bytes(kind: AttentionKind) -> int:
        rows = (_rows(layer, one_row) for layer in owners if layer.kind is kind)
        return sum(rows) * element_bytes

    return KVSize(
        global_bytes=num_tokens * row_bytes(AttentionKind.GLOBAL),
        window_bytes=min(num_tokens, spec.sliding_window) * row_bytes(AttentionKind.SLIDING),
    )


def _rows(layer: LayerSpec, one_row: bool) -> int:
    """Elements that a layer holds for one token."""
    return layer.num_kv_heads * layer.head_dim * (1 if layer.k_eq_v and one_row else 2)
