"""The frames of an expert call: a header, the slots and the hidden states; encoded without copies.

    call   header | tokens i32 | experts i32 | weights f32 | pad to 8 | hidden states, a row a token
    reply  header | one row for each (group, token) that has a slot, ascending; or a reason, UTF-8;
                    or nothing: "still computing", any number of times before the answer

Everything is little-endian. Slots come in token order; a token here is a row of this frame. What a
decoder returns are views into the frame.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import LinkError

VERSION = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = MAX_SLOTS = 1 << 20
LONGEST_HEARTBEAT_S = 3600.0

_CALL = struct.Struct("<4sHHQQIIII")
_REPLY = struct.Struct("<4sHHQQIIf4x")
_CALL_MAGIC, _REPLY_MAGIC = b"BXCL", b"BXRP"
_SLOT_BYTES = 12


class ReplyStatus(enum.IntEnum):
    """How a host answered a call."""

    OK = 0
    STALE_EPOCH = 1  # it serves another epoch than the call's
    REFUSED = 2  # the call asks for what it doesn't own, or makes no sense
    FAILED = 3  # it broke while computing
    COMPUTING = 4  # no answer yet, but a sign of life


@dataclass(frozen=True, slots=True)
class RouterHello:
    """What a router says in the handshake, so that it can't talk to the wrong host."""

    host_id: str
    weights_hash: str
    epoch: int
    heartbeat_s: float  # how often a host that computes for long shall say so

    def encode(self) -> bytes:
        """Return the JSON that the handshake carries."""
        fields = {
            "host_id": self.host_id,
            "weights_hash": self.weights_hash,
            "epoch": self.epoch,
            "beat_s": self.heartbeat_s,
        }
        return json.dumps(fields).encode()

    @staticmethod
    def decode(data: bytes) -> RouterHello:
        """Read what `encode` wrote. Raises LinkError when the bytes are no hello."""
        try:
            fields = json.loads(data)
            hello = RouterHello(
                host_id=str(fields["host_id"]),
                weights_hash=str(fields["weights_hash"]),
                epoch=int(fields["epoch"]),
                heartbeat_s=float(fields["beat_s"]),
            )
        except (ValueError, KeyError, TypeError):
            raise LinkError("The router's hello can't be read.") from None
        if not 0 < hello.heartbeat_s <= LONGEST_HEARTBEAT_S:
            raise LinkError("The router's hello can't be read.")
        return hello


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """An expert call as a host reads it."""

    call_id: int
    epoch: int
    layer_idx: int
    hidden_states: Tensor  # [num_tokens, hidden]
    slot_table: Tensor  # [3, num_slots] int32: tokens, logical expert ids, bits of fp32 weights


@dataclass(frozen=True, slots=True)
class ExpertReply:
    """An answer as the router reads it."""

    call_id: int
    epoch: int
    status: ReplyStatus
    compute_s: float  # the host's own time for the call
    rows: Tensor  # [num_rows, hidden], empty unless OK
    reason: str  # empty if OK


def encode_call(
    *,
    call_id: int,
    epoch: int,
    layer_idx: int,
    hidden_states: Tensor,
    slot_table: Tensor,
) -> list[memoryview]:
    """Encode a call into the parts of its frame, without copying the tensors.

    Args:
        call_id: what the reply names.
        epoch: of the placement.
        layer_idx: of the experts.
        hidden_states: [num_tokens, hidden], contiguous on the CPU.
        slot_table: [3, num_slots] int32, contiguous on the CPU: rows of `hidden_states`, logical
            expert ids, the bits of the fp32 weights.
    """
    num_tokens, hidden_size = hidden_states.shape
    num_slots = slot_table.shape[1]
    kind = DTYPES.index(hidden_states.dtype)
    head = _CALL.pack(
        _CALL_MAGIC, VERSION, kind, call_id, epoch, layer_idx, num_tokens, num_slots, hidden_size
    )
    padding = bytes(_hidden_offset(num_slots) - _CALL.size - _SLOT_BYTES * num_slots)
    return [memoryview(head), _to_bytes(slot_table), memoryview(padding), _to_bytes(hidden_states)]


def decode_call(frame: memoryview, num_experts: int, hidden_size: int) -> ExpertCall:
    """Read a call. Raises LinkError when the frame is malformed or out of bounds in any field."""
    if len(frame) < _CALL.size:
        raise LinkError("The expert call is cut short.")
    magic, version, kind, call_id, epoch, layer_idx, num_tokens, num_slots, hidden = (
        _CALL.unpack_from(frame)
    )
    if magic != _CALL_MAGIC or version != VERSION or kind >= len(DTYPES):
        raise LinkError("The frame is no expert call of this version.")
    if hidden != hidden_size or num_tokens > MAX_TOKENS or num_slots > MAX_SLOTS:
        raise LinkError(
            f"An expert call with {num_tokens} tokens of {hidden} and {num_slots} slots exceeds "
            f"the limits of {MAX_TOKENS} tokens of {hidden_size} and {MAX_SLOTS} slots."
        )
    dtype, offset = DTYPES[kind], _hidden_offset(num_slots)
    if len(frame) != offset + num_tokens * hidden_size * dtype.itemsize:
        raise LinkError("The expert call isn't as long as its header says.")
    slots = np.frombuffer(frame, np.int32, 3 * num_slots, _CALL.size).reshape(3, num_slots)
    ids = slots[:2].view(np.uint32)  # so that a negative one is too large
    if num_slots and (ids[0].max() >= num_tokens or ids[1].max() >= num_experts):
        raise LinkError("The expert call names a token or an expert that doesn't exist.")
    hidden_states = _to_rows(frame[offset:], dtype, num_tokens, hidden_size)
    return ExpertCall(call_id, epoch, layer_idx, hidden_states, torch.from_numpy(slots))


def peek_call_id(frame: memoryview) -> int:
    """Return the call id of a frame that may be malformed otherwise; 0 if it is too short."""
    return int(_CALL.unpack_from(frame)[3]) if len(frame) >= _CALL.size else 0


def encode_rows(call_id: int, epoch: int, rows: Tensor, compute_s: float) -> list[memoryview]:
    """Encode an OK reply with rows [num_rows, hidden], contiguous on the CPU."""
    num_rows, hidden_size = rows.shape
    kind = DTYPES.index(rows.dtype) << 8 | ReplyStatus.OK
    head = _REPLY.pack(
        _REPLY_MAGIC, VERSION, kind, call_id, epoch, num_rows, hidden_size, compute_s
    )
    return [memoryview(head), _to_bytes(rows)]


def encode_failure(call_id: int, epoch: int, status: ReplyStatus, reason: str) -> list[memoryview]:
    """Encode a refusal, with the epoch that the host serves."""
    head = _REPLY.pack(_REPLY_MAGIC, VERSION, status, call_id, epoch, 0, 0, 0.0)
    return [memoryview(head), memoryview(reason.encode())]


def encode_computing(call_id: int) -> list[memoryview]:
    """Encode a sign of life: the call is still being computed."""
    return encode_failure(call_id, 0, ReplyStatus.COMPUTING, "")


def decode_reply(frame: memoryview) -> ExpertReply:
    """Read a reply. Raises LinkError when the frame is malformed."""
    if len(frame) < _REPLY.size:
        raise LinkError("The expert reply is cut short.")
    magic, version, kind, call_id, epoch, num_rows, hidden_size, compute_s = _REPLY.unpack_from(
        frame
    )
    kind, status = kind >> 8, kind & 0xFF
    is_known = kind < len(DTYPES) and status <= max(ReplyStatus)
    if magic != _REPLY_MAGIC or version != VERSION or not is_known:
        raise LinkError("The frame is no expert reply of this version.")
    body, dtype = frame[_REPLY.size :], DTYPES[kind]
    if status != ReplyStatus.OK:
        reason = bytes(body).decode(errors="replace")
        return ExpertReply(call_id, epoch, ReplyStatus(status), 0.0, torch.empty(0, 0), reason)
    if len(body) != num_rows * hidden_size * dtype.itemsize:
        raise LinkError("The expert reply isn't as long as its header says.")
    rows = _to_rows(body, dtype, num_rows, hidden_size)
    return ExpertReply(call_id, epoch, ReplyStatus.OK, compute_s, rows, "")


def _hidden_offset(num_slots: int) -> int:
    return (_CALL.size + _SLOT_BYTES * num_slots + 7) & ~7


def _to_bytes(rows: Tensor) -> memoryview:
    assert rows.is_contiguous() and not rows.is_cuda
    if not rows.numel():
        return memoryview(b"")
    return rows.detach().reshape(-1).view(torch.uint8).numpy().data


def _to_rows(data: memoryview, dtype: torch.dtype, num_rows: int, hidden_size: int) -> Tensor:
    if not num_rows * hidden_size:
        return torch.empty(num_rows, hidden_size, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=num_rows * hidden_size)
    return flat.view(num_rows, hidden_size)
