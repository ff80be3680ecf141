"""The statistics of iterations, which /metrics hands out once."""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime
from typing import Any

from sidecar.lab.engine.messages import Counters, Iteration
from sidecar.lab.engine.spec import EngineSpec

_KEPT = 1000
IDLE_WAIT_S = 2.0
"""How long /metrics waits for an iteration when there is none to hand out."""


class IterationStats:
    """The iterations since the last look; none are kept unless the server was told to keep them."""

    def __init__(self, spec: EngineSpec, is_on: bool) -> None:
        self.is_on = is_on
        self._spec = spec
        self._kept: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._new = asyncio.Event()

    def add(self, iteration: Iteration, counters: Counters, latency_ms: float) -> None:
        """Keep what is said of an iteration that has ended."""
        if self.is_on:
            self._kept.append(self._entry(iteration, counters, latency_ms))
            self._new.set()

    async def drain(self, wait_s: float = IDLE_WAIT_S) -> list[dict[str, Any]]:
        """Return and forget what is kept; if that is nothing, wait for an iteration."""
        if self.is_on and not self._kept:
            self._new.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._new.wait()
            except TimeoutError:
                return []
        kept = list(self._kept)
        self._kept.clear()
        return kept

    def _entry(self, iteration: Iteration, counters: Counters, latency_ms: float) -> dict[str, Any]:
        context, generation = len(iteration.context), len(iteration.generation)
        used = counters.kv_used_blocks
        return {
            "cpuMemUsage": 0,
            "gpuMemUsage": 0,
            "inflightBatchingStats": {
                "avgNumDecodedTokensPerIter": 1.0 if generation else 0.0,
                "microBatchId": 0,
                "numContextRequests": context,
                "numCtxTokens": counters.context_tokens if context else 0,
                "numGenRequests": generation,
                "numPausedRequests": counters.paused,
                "numScheduledRequests": context + generation,
            },
            "iter": iteration.index,
            "iterLatencyMS": latency_ms,
            "kvCacheStats": {
                "allocNewBlocks": 0,
                "allocTotalBlocks": used,
                "cacheHitRate": 0.0,
                "freeNumBlocks": counters.kv_max_blocks - used,
                "maxNumBlocks": counters.kv_max_blocks,
                "missedBlocks": 0,
                "reusedBlocks": 0,
                "tokensPerBlock": self._spec.tokens_per_block,
                "usedNumBlocks": used,
            },
            "maxNumActiveRequests": self._spec.max_batch_size,
            "newActiveRequestsQueueLatencyMS": 0.0,
            "numActiveRequests": counters.active,
            "numCompletedRequests": 0,
            "numNewActiveRequests": context,
            "numQueuedRequests": counters.waiting,
            "pinnedMemUsage": 0,
            "staticBatchingStats": None,
            "timestamp": datetime.now(UTC).strftime("%m-%d-%Y %H:%M:%S.%f"),
        }
