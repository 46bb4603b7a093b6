"""How large a context's KV is, from the model's geometry: what a session takes in Redis."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.spec import AttentionKind, KVLayout, ModelSpec


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
    spec: ModelSpec, num_tokens: int, element_bytes: int = 2, *, kv_layout: KVLayout = "values"
) -> KVSize:
    """The KV of `num_tokens` tokens. Layers that read another layer's KV hold nothing."""
    owners = [layer for layer in spec.layers if layer.owns_kv]

    def row_bytes(kind: AttentionKind) -> int:
        elements = (layer.kv_elements(kv_layout) for layer in owners if layer.kind is kind)
        return sum(elements) * element_bytes

    return KVSize(
        global_bytes=num_tokens * row_bytes(AttentionKind.GLOBAL),
        window_bytes=min(num_tokens, spec.sliding_window) * row_bytes(AttentionKind.SLIDING),
    )
