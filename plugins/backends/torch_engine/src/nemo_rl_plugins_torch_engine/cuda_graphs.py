"""Decoding steps with fixed shapes and buffers, replayed as CUDA graphs.

A graph holds kernels, addresses and shapes, so a step is padded to a bucket of rows and of cache
positions, and its inputs are copied to buffers that stay where they are. The padding is ordinary PyTorch
and runs on any device (without graphs it gives the same logits); only `_capture` needs CUDA.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_rl_plugins_torch_engine.cache import KVCache
from nemo_rl_plugins_torch_engine.passes import DecodePass, Decoder, PrefillPass

__all__ = ["BucketedDecoder", "length_bucket", "row_buckets"]

logger = logging.getLogger(__name__)

_Replay = Callable[[], Tensor]

_WARM_UP_STEPS = 2


def row_buckets(num_rows: int) -> list[int]:
    """Batch sizes that are captured: powers of two and one and a half times these, up to `num_rows`."""
    sizes = {num_rows}
    size = 1
    while size < num_rows:
        sizes.add(size)
        if size >= 16 and size * 3 // 2 < num_rows:
            sizes.add(size * 3 // 2)
        size *= 2
    return sorted(sizes)


def length_bucket(length: int, capacity: int) -> int:
    """Cache positions that a step of `length` looks at: in steps of 128 to 1024, then of 1024."""
    step = 128 if length <= 1024 else 1024
    return min(-(-length // step) * step, capacity)


class BucketedDecoder:
    """Runs another decoder's steps in buckets, on CUDA as graphs.

    Args:
        inner: Decoder whose `decode` has no shape or control flow that depends on values.
        capture: Record and replay CUDA graphs; False runs the padded step as it is.
    """

    def __init__(self, inner: Decoder, *, capture: bool) -> None:
        self._inner = inner
        self._capture_graphs = capture
        self.vocab_size = inner.vocab_size
        cache = inner.cache
        self._buckets = row_buckets(cache.num_rows)
        self._tokens = torch.zeros(cache.num_rows, dtype=torch.int64, device=cache.device)
        self._positions = torch.zeros(cache.num_rows, dtype=torch.int64, device=cache.device)
        self._rows = torch.arange(cache.num_rows, device=cache.device)
        self._replays: dict[tuple[int, int], _Replay] = {}
        self._generation = cache.generation
        self._pool: Any = None

    @property
    def cache(self) -> KVCache:
        """The inner decoder's cache."""
        return self._inner.cache

    def prefill(self, batch: PrefillPass) -> Tensor:
        """Return logits [num_prompts, V], see `Decoder.prefill`; prompts are too varied to capture."""
        return self._inner.prefill(batch)

    def decode(self, batch: DecodePass) -> Tensor:
        """Return logits [R, V], see `Decoder.decode`. They are valid until the next step.

        Rows that pad the bucket write a token 0 at position 0 of rows that nobody uses.
        """
        count = batch.rows.shape[0]
        size = self._buckets[bisect.bisect_left(self._buckets, count)]
        length = length_bucket(batch.length, self.cache.capacity)
        self._tokens[:count] = batch.token_ids
        self._positions[:count] = batch.positions
        self._tokens[count:size] = 0
        self._positions[count:size] = 0
        if self._generation != self.cache.generation:
            self._replays.clear()
            self._generation = self.cache.generation
        replay = self._replays.get((size, length))
        if replay is None:
            replay = self._replays[size, length] = self._prepare(size, length)
        return replay()[:count]

    def refresh(self) -> int:
        """Weights may lie elsewhere now: captured steps that point to the old ones are dropped."""
        self._replays.clear()
        return self._inner.refresh()

    def _prepare(self, size: int, length: int) -> _Replay:
        static = DecodePass(self._tokens[:size], self._positions[:size], self._rows[:size], length)

        def run() -> Tensor:
            return self._inner.decode(static)

        return self._capture(run) if self._capture_graphs else run

    def _capture(self, run: _Replay) -> _Replay:
        """Record `run` as a graph. Its warm-up runs write what the replay writes again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: the trainer's thread may use CUDA while this one records
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = run()

        def replay() -> Tensor:
            """Run the graph; returns logits [size, V]."""
            graph.replay()
            return logits

        return replay
