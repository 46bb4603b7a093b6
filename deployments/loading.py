"""From a configuration to an engine in this process, with whatever experts it is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cluster.checkpoint import Checkpoint, resolve_model
from cluster.config import Config
from cluster.errors import ConfigError, NotEnoughMemory, Unavailable
from cluster.kernels.choose import kernels_for
from cluster.spec import KVLayout, ModelSpec
from deployments.layout import expert_groups
from engine.cache.block_hash import BlockHasher
from engine.cache.block_store import BlockStore
from engine.cache.kv_cache import KVCacheConfig
from engine.cache.kv_sizing import kv_bytes_per_block, longest_context, size_kv_cache
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.model.decoder_layer import Experts
from engine.model.model import GemmaDecoder
from engine.prefill_meter import PrefillMeter
from engine.request import SamplingParams
from engine.runner import ModelRunner
from engine.scheduling.fair_share import FairShare
from engine.scheduling.load_shedding import LoadShedding
from engine.scheduling.token_costs import TokenCosts
from engine.text.tokenizer import Tokenizer
from experts.local import LocalExperts

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
# What names the layouts of the KV cache in the keys of stored values.
STORED_LAYOUTS: dict[KVLayout, str] = {"values": "v", "projection": "raw", "separate": "split"}
NUMERICS = 1  # of our own code: raise it with a change of any bit of keys or values

Connect = Callable[[ModelRunner, PrefillMeter], BlockStore | None]


@dataclass(frozen=True, slots=True)
class Source:
    """The model as every part opens it: without reading a weight."""

    model_dir: Path
    spec: ModelSpec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def open(config: Config) -> Source:
        """Raises CheckpointError, or ConfigError for a device that isn't there."""
        model_dir = resolve_model(config.model_source)
        device = pick_device(config)
        return Source(
            model_dir,
            ModelSpec.load(model_dir),
            Checkpoint(model_dir),
            device,
            pick_dtype(config, device),
        )

    @property
    def kernels(self) -> str:
        """Whose kernels compute it here: "native" or "PyTorch"."""
        return kernels_for(self.device, self.dtype).name


def load_engine(
    config: Config,
    source: Source,
    experts: Experts | None,
    on_progress: Progress | None = None,
    connect: Connect | None = None,
) -> EngineCore:
    """Load the attention side, size the KV cache, and put the engine together. `connect` gives the
    store of its blocks.

    Raises CheckpointError or NotEnoughMemory.
    """
    try:
        model = GemmaDecoder.load(
            source.spec,
            source.checkpoint,
            source.device,
            source.dtype,
            config.batch_invariant,
            on_progress,
        )
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"The model doesn't fit on {source.device}: {error}") from None
    tokenizer = Tokenizer.load(source.model_dir)
    limits = SpecLimits.from_spec(source.spec, pick_context(config, source))
    limits = with_turn_end(limits, tokenizer)
    kv = size_cache(config, source, limits.max_model_len)
    runner = ModelRunner(model, kv, experts, num_micro_batches=config.experts.micro_batches)
    meter = PrefillMeter()
    return EngineCore(
        runner,
        kv,
        spec_limits=limits,
        hasher=make_hasher(config, source),
        checkpoint_blocks=config.engine.checkpoint_blocks,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_num_seqs=config.engine.max_num_seqs,
        policy=FairShare(TokenCosts.from_spec(source.spec)) if config.engine.fair_share else None,
        load_shedding=LoadShedding(
            config.engine.max_queue,
            config.engine.max_queue_per_tenant,
            config.engine.max_queue_wait_s,
        ),
        tokenizer=tokenizer,
        store=None if connect is None else connect(runner, meter),
        prefill_meter=meter,
    )


def load_local_experts(
    config: Config, source: Source, on_progress: Progress | None = None
) -> LocalExperts | None:
    """The experts in this process; None for a dense model."""
    if not source.spec.is_moe:
        return None
    return LocalExperts(
        source.spec,
        source.checkpoint,
        expert_groups(config, source.spec),
        source.dtype,
        source.device,
        config.batch_invariant,
        on_progress,
    )


def warm_up(engine: EngineCore) -> None:
    """Produce two tokens. Raises Unavailable when that fails: the engine can't serve."""
    engine.add(
        request_id="warm-up",
        prompt_ids=[engine.limits.eos_token_ids[0] if engine.limits.eos_token_ids else 0],
        sampling=SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True),
    )
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise Unavailable(f"The first token failed: {output.error}")


def pick_device(config: Config) -> torch.device:
    """`device` of the configuration, where auto is the card that this process sees, if any."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(f"device {config.device!r} is none that torch knows.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this process sees no card.")
    return device


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """`dtype` of the configuration; auto is float32 on a CPU, bfloat16 on a card."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def pick_context(config: Config, source: Source) -> int:
    """`engine.max_model_len`; null is the model's context, or what of it fits in the KV cache."""
    engine, whole = config.engine, source.spec.max_position_embeddings
    if engine.max_model_len is not None:
        return engine.max_model_len
    if engine.num_blocks is not None:
        return whole
    longest = longest_context(
        source.spec,
        engine.kv_bytes,
        dtype=source.dtype,
        block_size=engine.block_size,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_layout=engine.kv_layout,
    )
    if longest < whole:
        logger.warning(
            "engine.kv_bytes holds a context of %d tokens, the model's is %d; raise engine.kv_bytes"
            " for a longer one.",
            longest,
            whole,
        )
    return longest


def size_cache(config: Config, source: Source, max_model_len: int) -> KVCacheConfig:
    """Blocks of each KV cache group, from the bytes or the number of blocks that are configured."""
    engine = config.engine
    if engine.num_blocks is not None:
        kinds = {layer.kind for layer in source.spec.layers if layer.owns_kv}
        block = engine.block_size, source.dtype, engine.kv_layout
        return KVCacheConfig(
            engine.block_size,
            dict.fromkeys(kinds, engine.num_blocks),
            {kind: kv_bytes_per_block(source.spec, kind, *block) for kind in kinds},
            engine.kv_layout,
        )
    return size_kv_cache(
        source.spec,
        engine.kv_bytes,
        max_model_len,
        dtype=source.dtype,
        block_size=engine.block_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        prefix_caching=engine.prefix_caching,
        kv_layout=engine.kv_layout,
    )


def make_hasher(config: Config, source: Source) -> BlockHasher | None:
    """What names KV blocks; None without prefix caching."""
    if not config.engine.prefix_caching:
        return None
    engine = config.engine
    return BlockHasher(engine.block_size, fingerprint(config, source), engine.shared_tenants)


def fingerprint(config: Config, source: Source) -> str:
    """Names all that the bits of keys and values depend on beside the tokens."""
    facts = (
        NUMERICS,
        source.checkpoint.fingerprint,
        source.device.type,
        source.kernels,
        source.dtype,
        config.batch_invariant,
        config.experts.num_groups,
        STORED_LAYOUTS[config.engine.kv_layout],
    )
    return " ".join(map(str, facts))


def with_turn_end(limits: SpecLimits, tokenizer: Tokenizer) -> SpecLimits:
    """The end-of-turn token ends an answer too, also where generation_config.json is missing."""
    ends = dict.fromkeys((*limits.eos_token_ids, *tokenizer.eos_ids))
    return replace(limits, eos_token_ids=tuple(ends))
