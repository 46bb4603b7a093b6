"""The sum over groups, in a fixed order, and the reference that all expert code is compared with.

Whoever answers, no bit changes: `Kernels.expert_partials` adds a token's experts within a group in
ascending id, and groups are added here in fp32 in id order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_partials(partials: Tensor) -> Tensor:
    """Add the groups' partial sums in fp32, in id order.

    Args:
        partials: [num_groups, num_tokens, hidden], every group, in id order.

    Returns:
        [num_tokens, hidden] in the dtype of the partials.
    """
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial
    return total.to(partials.dtype)


def reference_experts(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Loop over tokens and their experts, the obvious way; for tests.

    Args:
        hidden_states: [num_tokens, hidden].
        topk_ids: [num_tokens, k].
        topk_weights: [num_tokens, k].
        gate_up: [num_experts, 2 * intermediate, hidden], of all experts in order.
        down: [num_experts, hidden, intermediate].

    Returns:
        [num_tokens, hidden].
    """
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    for token, (ids, weights) in enumerate(zip(topk_ids, topk_weights, strict=True)):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            gate, up = (gate_up[expert] @ hidden_states[token]).chunk(2)
            row = down[expert] @ (F.gelu(gate, approximate="tanh") * up)
            output[token] += weight * row.float()
    return output.to(hidden_states.dtype)
