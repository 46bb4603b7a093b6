"""From a configuration to an engine in this process."""

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

OnProgress = Callable[[int, int], None]  # called with (num_done, num_total)
# The names of KV cache layouts in the keys of stored values.
STORED_LAYOUTS: dict[KVLayout, str] = {"values": "v", "projection": "raw", "separate": "split"}
NUMERICS = 1  # part of `fingerprint`: raise it with a change of any bit of keys or values


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is found and described, of which no weight is read yet."""

    model_dir: Path
    spec: ModelSpec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def open(config: Config) -> ModelSource:
        """Find the model of a configuration and choose the device and the dtype for it.

        Raises:
            CheckpointError: the model is missing or not supported.
            ConfigError: the device is not available.
        """
        model_dir = resolve_model(config.model_source)
        device = pick_device(config)
        return ModelSource(
            model_dir=model_dir,
            spec=ModelSpec.load(model_dir),
            checkpoint=Checkpoint(model_dir),
            device=device,
            dtype=pick_dtype(config, device),
        )

    @property
    def kernels(self) -> str:
        """The kernels that compute the model here: "native" or "PyTorch"."""
        return kernels_for(self.device, self.dtype).name


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory with its KV cache: all that an engine is built on."""

    runner: ModelRunner
    kv: KVCacheConfig
    limits: SpecLimits
    tokenizer: Tokenizer


def load_model(
    config: Config,
    source: ModelSource,
    experts: Experts | None,
    on_progress: OnProgress | None = None,
) -> LoadedModel:
    """Load everything of a model but the experts, and allocate its KV cache.

    Args:
        config: Gives the sizes of the KV cache and of micro-batches.
        source: The model.
        experts: Computes the routed experts; None for a dense model.
        on_progress: Called while weights are read.

    Raises:
        CheckpointError: The weights can't be read.
        NotEnoughMemory: Weights or KV cache don't fit.
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
    kv = size_cache(config, source, limits.max_model_len)
    return LoadedModel(
        runner=ModelRunner(model, kv, experts, num_micro_batches=config.experts.micro_batches),
        kv=kv,
        limits=with_turn_end(limits, tokenizer),
        tokenizer=tokenizer,
    )


def make_engine(
    config: Config,
    source: ModelSource,
    model: LoadedModel,
    *,
    store: BlockStore | None = None,
    prefill_meter: PrefillMeter | None = None,
) -> EngineCore:
    """Build the engine that the configuration describes.

    Args:
        config: The configuration.
        source: Where the model was loaded from.
        model: The loaded model; one engine at a time may use it.
        store: The slower tier of KV blocks; None keeps them in memory only.
        prefill_meter: Learns how long prefill takes; the store asks it.
    """
    engine = config.engine
    return EngineCore(
        model.runner,
        model.kv,
        spec_limits=model.limits,
        hasher=make_hasher(config, source),
        checkpoint_blocks=engine.checkpoint_blocks,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        policy=FairShare(TokenCosts.from_spec(source.spec)) if engine.fair_share else None,
        load_shedding=LoadShedding(
            engine.max_queue, engine.max_queue_per_tenant, engine.max_queue_wait_s
        ),
        tokenizer=model.tokenizer,
        store=store,
        prefill_meter=prefill_meter,
    )


def load_engine(config: Config, source: ModelSource, experts: Experts | None) -> EngineCore:
    """Load a model and build its engine, without a store. Raises as `load_model` does."""
    return make_engine(config, source, load_model(config, source, experts))


def load_local_experts(
    config: Config, source: ModelSource, on_progress: OnProgress | None = None
) -> LocalExperts | None:
    """Load all experts into this process; None for a dense model.

    Raises:
        CheckpointError: The weights can't be read.
        NotEnoughMemory: They don't fit.
    """
    if not source.spec.is_moe:
        return None
    return LocalExperts(
        source.spec,
        source.checkpoint,
        expert_groups(config, source.spec),
        dtype=source.dtype,
        device=source.device,
        batch_invariant=config.batch_invariant,
        on_progress=on_progress,
    )


def warm_up(engine: EngineCore) -> None:
    """Produce two tokens. Raises Unavailable if that fails."""
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
    """Resolve `device`: auto is this process's GPU, or the CPU if it has none.

    Raises:
        ConfigError: torch doesn't know the device, or sees none of its kind.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(f"device {config.device!r} is not known to torch.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this process sees no GPU.")
    return device


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Resolve `dtype`: auto is float32 on a CPU, bfloat16 on a GPU."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def pick_context(config: Config, source: ModelSource) -> int:
    """Resolve `engine.max_model_len`, in tokens: null is the model's context, or the longest that
    fits in the KV cache if that is shorter.
    """
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
            "engine.kv_bytes holds a context of %d tokens; the model supports %d. Raise "
            "engine.kv_bytes for a longer context.",
            longest,
            whole,
        )
    return longest


def size_cache(config: Config, source: ModelSource, max_model_len: int) -> KVCacheConfig:
    """Size the KV cache by `engine.num_blocks` if it is set, else by `engine.kv_bytes`.

    Raises:
        NotEnoughMemory: A request of `max_model_len` tokens doesn't fit.
    """
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


def make_hasher(config: Config, source: ModelSource) -> BlockHasher | None:
    """Return what hashes KV blocks; None without prefix caching."""
    if not config.engine.prefix_caching:
        return None
    engine = config.engine
    return BlockHasher(engine.block_size, fingerprint(config, source), engine.shared_tenants)


def fingerprint(config: Config, source: ModelSource) -> str:
    """Return a text of everything that the bits of keys and values depend on beside the tokens.

    Blocks are only exchanged between engines with the same fingerprint.
    """
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
    """Let the tokenizer's end-of-turn tokens end an answer too.

    A model without generation_config.json would never stop.
    """
    ends = dict.fromkeys((*limits.eos_token_ids, *tokenizer.eos_ids))
    return replace(limits, eos_token_ids=tuple(ends))
