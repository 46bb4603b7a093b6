"""Values on their way from the KV tensors to the store, until their bytes are in plain memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from cluster.store.kv_store import KVStore
from deployments.decoder.kv.copies import as_bytes


class StagedWrites:
    """Puts values into the store: at once on a CPU, after the copy on a GPU."""

    def __init__(self, store: KVStore, device: torch.device) -> None:
        """Write to `store` what is copied from `device`."""
        self._store = store
        self._device = device
        self._thread = ThreadPoolExecutor(1, "kv-staged-writes")
        self._last: Future[None] | None = None

    def put(self, tenant: str, keys: Sequence[bytes], values: Sequence[Tensor]) -> None:
        """Put values that are not changed any more; on a GPU the current stream writes them."""
        if self._device.type == "cpu":
            self._put(tenant, keys, values)
            return
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        landed.record(torch.cuda.current_stream(self._device))
        self._last = self._thread.submit(self._put_later, landed, tenant, keys, values)

    def remove(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Remove values from the store, those of earlier `put` calls too."""
        if self._device.type == "cpu":
            self._store.remove(tenant, keys)
        else:
            self._last = self._thread.submit(self._store.remove, tenant, keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until the store has all values; returns False if that takes longer."""
        return self._last is None or not wait([self._last], timeout_s).not_done

    def close(self) -> None:
        """Drop the values that still wait."""
        self._thread.shutdown(cancel_futures=True)

    def _put_later(
        self, landed: torch.cuda.Event, tenant: str, keys: Sequence[bytes], values: Sequence[Tensor]
    ) -> None:
        landed.synchronize()
        self._put(tenant, keys, values)

    def _put(self, tenant: str, keys: Sequence[bytes], values: Sequence[Tensor]) -> None:
        for key, value in zip(keys, values, strict=True):
            self._store.put(tenant, key, [as_bytes(value)])
