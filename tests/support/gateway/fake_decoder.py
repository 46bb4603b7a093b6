"""A decoder without a model, whose runner counts: real link, real engine core, no weights."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cluster.errors import LinkError
from cluster.links.connect import Endpoint, Listener
from cluster.metrics import Metrics
from cluster.spec import AttentionKind
from deployments.decoder.link import GatewayLinks, verify_gateway
from deployments.decoder.meters import EngineMeter
from deployments.decoder.step_loop import StepLoop
from engine.batch import Batch
from engine.cache.block_hash import BlockHasher
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.scheduling.load_shedding import LoadShedding
from engine.text.token_bytes import byte_level
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus

SECRET = b"secret of this test"
CONTEXT = 512
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"


class CountingRunner:
    """The token after t is t + 1: an answer to "...a" is "bcdef..."."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.num_steps = 0  # begun
        self.error: Exception | None = None
        self.go_on = threading.Event()  # cleared: hangs
        self.go_on.set()

    def execute(self, batch: Batch) -> Tensor:
        self.num_steps += 1
        time.sleep(self.step_s)
        self.go_on.wait(10)
        if self.error is not None:
            raise self.error
        ids = (batch.input_ids[batch.logits_indices] + 1) % 256
        return torch.nn.functional.one_hot(ids, 256).float() * 50


def make_tokenizer() -> Tokenizer:
    """Bytes are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    by_byte = {byte_level(char)[0]: char for char in alphabet}
    vocab = {by_byte[byte]: byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE))


class Decoder:
    """Everything of a decoder but the model, with a listener that gateways can find."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_queue: int = 8,
        max_num_seqs: int = 4,
        store: Any = None,
        num_blocks: int = 200,
        runner: Any = None,
        eos_ids: tuple[int, ...] = (),
    ) -> None:
        self.runner = runner or CountingRunner()
        self.registry = CollectorRegistry()
        self.ready = True
        self.budgets: list[tuple[str, int | None]] = []  # as requests told them
        self.engine = EngineCore(
            self.runner,
            KVCacheConfig(16, dict.fromkeys(AttentionKind, num_blocks)),
            spec_limits=SpecLimits(
                CONTEXT, 64, tokenizer.vocab_size, eos_token_ids=eos_ids or tokenizer.eos_ids
            ),
            max_num_batched_tokens=256,
            max_num_seqs=max_num_seqs,
            load_shedding=LoadShedding(max_queue),
            store=store,
            hasher=None if store is None else BlockHasher(16, "counter"),
            tokenizer=tokenizer,
        )
        meter = EngineMeter(Metrics(self.registry), "counter")
        self.loop = StepLoop(
            engine=self.engine,
            meter=meter,
            fill_status=self._fill_status,
            store=store,
            on_budget=lambda tenant, num_bytes: self.budgets.append((tenant, num_bytes)),
        )
        self.open()

    def open(self) -> None:
        self.listener = Listener(SECRET, verify_gateway)
        self.endpoint: Endpoint | None = self.listener.endpoint
        self.gateways = GatewayLinks(
            self.listener, self.loop.greeting, self.loop.on_message, self.loop.on_lost
        )
        self.loop.start(self.gateways)

    def find(self) -> Endpoint:
        if self.endpoint is None:
            raise LinkError("There is no decoder.")
        return self.endpoint

    def close(self) -> None:
        self.endpoint = None
        self.gateways.close()
        self.loop.close()

    def _fill_status(self, status: ClusterStatus) -> None:
        status.ready = self.ready
        status.reason = "" if self.ready else "No copy of expert group 2 is alive."
        status.model, status.context_tokens = "counter", CONTEXT
        status.vocab_size = self.engine.limits.vocab_size
