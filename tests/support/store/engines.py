"""Engines that come and go on one model, before one Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.config import StoreConfig
from cluster.metrics import Metrics
from cluster.spec import AttentionKind
from cluster.store.kv_store import KVStore
from cluster.store.reader import PendingLookup
from cluster.store.redis import RedisAddress
from cluster.store.scripts import tenant_prefix
from deployments.decoder.kv.block_store import KVBlockStore, kv_tensors
from deployments.verify.random_cases import make_texts
from engine.cache.block_hash import BlockHasher
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from tests.support.engine.fake_engine import drain, tokens_of
from tests.support.engine.invariant_subjects import Subject
from tests.support.waiting import wait_for

BLOCK_SIZE, NUM_TOKENS = 4, 6
KV = KVCacheConfig(BLOCK_SIZE, dict.fromkeys(AttentionKind, 200))
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TEXT = make_texts(160)[0]  # of 150 tokens
PROMPT = TEXT[:101]  # can be resumed after 25 blocks


class RecordingStore(KVStore):
    """A store that tells its last look-up."""

    last_lookup: PendingLookup | None = None

    def look_up(self, tenant: str, keys: Sequence[bytes], *, touch: bool = False) -> PendingLookup:
        lookup = super().look_up(tenant, keys, touch=touch)
        self.last_lookup = self.last_lookup if touch else lookup
        return lookup


class Deployment:
    """Engines that come and go on one model, before one Redis."""

    def __init__(self, subject: Subject, address: RedisAddress, **config: Any) -> None:
        self.subject = subject
        self.registry = CollectorRegistry()
        config = {"timeout_s": address.timeout_s, **config}
        self.kv_store = RecordingStore(
            address, b"m", "m", Metrics(self.registry), StoreConfig.model_construct(**config)
        )
        self.redis = address.client()
        self.alone = EngineCore(self.runner(), KV, spec_limits=self.limits)
        self.prefill_rate: float | None = None
        self.start()

    @property
    def limits(self) -> SpecLimits:
        return SpecLimits.from_spec(self.subject.model.spec, 256)

    def runner(self, kv: KVCacheConfig = KV) -> ModelRunner:
        return ModelRunner(self.subject.model, kv, self.subject.experts)

    def connect(self, runner: ModelRunner) -> KVBlockStore:
        assert self.kv_store.flush(5)
        tensors = kv_tensors(runner)
        block_size = next(iter(tensors.values()))[0].shape[1]
        window = self.subject.model.spec.sliding_window
        return KVBlockStore(
            tensors, block_size, window, "m", lambda _: self.kv_store, self.prefill_s
        )

    def prefill_s(self, start: int, stop: int) -> float | None:
        return None if self.prefill_rate is None else (stop - start) / self.prefill_rate

    def start(self, **options: Any) -> None:
        """An engine that remembers nothing, before what Redis holds."""
        runner = self.runner()
        self.blocks = self.connect(runner)
        self.core = EngineCore(
            runner,
            KV,
            spec_limits=self.limits,
            hasher=BlockHasher(BLOCK_SIZE, "m", shared_tenants=("b", "c")),
            store=self.blocks,
            **options,
        )

    def add(self, prompt: list[int], tenant: str = "default", request_id: str = "r") -> Request:
        return self.core.add(
            request_id=request_id, prompt_ids=prompt, sampling=GREEDY, tenant=tenant
        )

    def finish(self, request: Request) -> int:
        """Run to the end: the answer is that of an engine alone; how many tokens were cached."""
        outputs = drain(self.core)[request.request_id]
        assert tokens_of(outputs) == self.cold(request.prompt_ids)
        return outputs[-1].num_cached_tokens

    def ask(self, prompt: list[int], tenant: str = "default") -> int:
        return self.finish(self.add(prompt, tenant))

    def cold(self, prompt: list[int]) -> list[int]:
        self.alone.add(request_id="alone", prompt_ids=prompt, sampling=GREEDY)
        return tokens_of(drain(self.alone)["alone"])

    def wait_for_lookup(self) -> None:
        """Wait until Redis has answered the last look-up."""
        lookup = self.kv_store.last_lookup
        assert lookup is not None
        wait_for(lookup.done)

    def count(self, what: str, **labels: str) -> float:
        name = f"briolette_kv_store_{what}_total"
        return self.registry.get_sample_value(name, {"model": "m", **labels}) or 0.0

    def stored(self, tenant: str = "default") -> set[bytes]:
        assert self.blocks.flush(5)
        prefix = tenant_prefix(tenant) + b"kv:"
        return {name.removeprefix(prefix) for name in self.redis.scan_iter(prefix + b"*")}

    def close(self) -> None:
        self.blocks.close()
        self.redis.close()
