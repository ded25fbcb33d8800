"""Continuous batching: which requests are in the batch, and one step of all of them.

Not thread-safe: the engine's loop calls it. Rows 0 to n - 1 of the cache are the active sequences.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from typing import TypeVar

import torch
from torch import Tensor

from nemo_rl_core.errors import GenerationError
from nemo_rl_plugins_torch_engine.passes import DecodePass, Decoder, PrefillPass
from nemo_rl_plugins_torch_engine.sampling import RowSampling
from nemo_rl_plugins_torch_engine.sequence import Prompt, Sequence

__all__ = ["Scheduler"]

_T = TypeVar("_T")
logger = logging.getLogger(__name__)


class Scheduler:
    """The batch of a decoder."""

    def __init__(self, decoder: Decoder, *, num_rows: int, max_prefill_tokens: int, device: torch.device) -> None:
        self.decoder = decoder
        self.num_rows = num_rows
        self.max_prefill_tokens = max_prefill_tokens
        self.device = device
        self.version = 0
        self.counters: Counter[str] = Counter()
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        self._sampling: RowSampling | None = None
        self._row_index = torch.arange(num_rows, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(num_rows, dtype=torch.int64, device=device)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in the batch."""
        return not self.active and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a free row."""
        prompt = self._prompts.get(sequence.prompt_ids)
        if prompt is None:
            prompt = self._prompts[sequence.prompt_ids] = Prompt(sequence.prompt_ids)
        sequence.prompt = prompt
        prompt.num_waiting += 1
        self.waiting.append(sequence)

    def step(self) -> list[tuple[Sequence, GenerationError | None]]:
        """Drop the cancelled, admit what fits, sample one token for every row; those that finished."""
        finished: list[tuple[Sequence, GenerationError | None]] = []
        self._drop_cancelled()
        while self.waiting and len(self.active) < self.num_rows:
            finished += self._admit()
        if self.active:
            finished += self._decode()
        return finished

    def weights_changed(self, version: int, *, recompute: bool = False) -> None:
        """Stamp later tokens with `version`; nothing computed for a prompt before is used again.

        Args:
            version: Of the new weights.
            recompute: Compute the keys and values of sequences in the batch anew too.
        """
        self.version = version
        for prompt in self._prompts.values():
            prompt.forget()
        if recompute:
            self._recompute_rows()

    def _recompute_rows(self) -> None:
        """Run the tokens of every row but its newest, which the next decoding step adds, through the new weights."""
        rows = sorted(self.active, key=lambda s: s.length)
        while rows:
            part, budget = [rows.pop(0)], self.max_prefill_tokens
            budget -= part[0].length
            while rows and rows[0].length <= budget:
                budget -= rows[0].length
                part.append(rows.pop(0))
            tokens = [[*s.prompt_ids, *s.token_ids[:-1]] for s in part]
            self.decoder.prefill(PrefillPass.of(tokens, [[s.row] for s in part], self.device))
            self.counters["recomputed_tokens"] += sum(map(len, tokens))

    def drain(self) -> list[Sequence]:
        """Remove and return every sequence (after a failure)."""
        everything = [*self.active, *self.waiting]
        self.active, self.waiting, self._prompts = [], deque(), {}
        self._sampling = None
        return everything

    # -- admission -------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        if any(s.cancelled for s in self.waiting):
            for sequence in self.waiting:
                if sequence.cancelled:
                    self._leave_queue(sequence)
                    self._forget_unused(sequence.prompt)
            self.waiting = deque(s for s in self.waiting if not s.cancelled)
        gone = [s for s in self.active if s.cancelled]
        if gone:
            self._free(gone)

    def _leave_queue(self, sequence: Sequence) -> None:
        sequence.prompt.num_waiting -= 1

    def _forget_unused(self, prompt: Prompt) -> None:
        if prompt.num_waiting == 0 and not prompt.holders:
            self._prompts.pop(prompt.token_ids, None)

    def _admit(self) -> list[tuple[Sequence, GenerationError | None]]:
        """Move sequences from the queue to free rows and sample the first token of each."""
        entering = self._take()
        new: dict[Prompt, list[int]] = {}
        for sequence in entering:
            prompt = sequence.prompt
            if prompt.logits is None:
                new.setdefault(prompt, []).append(sequence.row)
            else:
                self._copy_prompt(prompt, sequence.row)
                self.counters["shared_prefill_tokens"] += len(prompt.token_ids)
        if new:
            self._prefill(new)
        for sequence in entering:
            sequence.prompt.holders.append(sequence)
            sequence.prompt.snapshot = sequence.prompt.snapshot if sequence.prompt.num_waiting else None
        self.active += entering
        self._sampling = None
        logits = torch.stack([_known(s.prompt.logits) for s in entering])
        tokens, logprobs = RowSampling.of(entering, self.decoder.vocab_size, self.device).draw(logits)
        return self._append(entering, tokens, logprobs)

    def _take(self) -> list[Sequence]:
        """The next sequences of the queue, by free rows and prefill budget, with their rows."""
        entering: list[Sequence] = []
        seen: set[Prompt] = set()
        budget = self.max_prefill_tokens
        first_row = len(self.active)
        while self.waiting and first_row + len(entering) < self.num_rows:
            prompt = self.waiting[0].prompt
            if prompt.logits is None and prompt not in seen:
                if seen and len(prompt.token_ids) > budget:
                    break
                budget -= len(prompt.token_ids)
                seen.add(prompt)
            sequence = self.waiting.popleft()
            self._leave_queue(sequence)
            sequence.row = first_row + len(entering)
            entering.append(sequence)
        self.decoder.cache.ensure(max(len(s.prompt.token_ids) for s in entering) + 1)
        return entering

    def _copy_prompt(self, prompt: Prompt, row: int) -> None:
        if prompt.holders:
            self.decoder.cache.copy_rows([prompt.holders[0].row], [row], len(prompt.token_ids))
        else:
            self.decoder.cache.restore(_known(prompt.snapshot), [row])

    def _prefill(self, rows_of: dict[Prompt, list[int]]) -> None:
        prompts = sorted(rows_of, key=lambda p: len(p.token_ids))
        packed = PrefillPass.of([p.token_ids for p in prompts], [rows_of[p] for p in prompts], self.device)
        logits = self.decoder.prefill(packed)
        for prompt, row_logits in zip(prompts, logits, strict=True):
            prompt.logits = row_logits
            self.counters["prefill_tokens"] += len(prompt.token_ids)
            self.counters["shared_prefill_tokens"] += len(prompt.token_ids) * (len(rows_of[prompt]) - 1)
        self.counters["prefill_passes"] += 1

    # -- decoding --------------------------------------------------------------------------------------

    def _decode(self) -> list[tuple[Sequence, GenerationError | None]]:
        count = len(self.active)
        length = max(s.length for s in self.active)
        self.decoder.cache.ensure(length)
        if self._sampling is None or self._sampling.exhausted:
            self._load_rows()
        sampling = _known(self._sampling)
        batch = DecodePass(self._tokens[:count], self._positions[:count], self._row_index[:count], length)
        tokens, logprobs = sampling.draw(self.decoder.decode(batch))
        self._tokens[:count] = tokens
        self._positions[:count] += 1
        self.counters["steps"] += 1
        self.counters["filled_rows"] += count
        return self._append(list(self.active), tokens, logprobs)

    def _load_rows(self) -> None:
        """Make the tensors of the rows anew, after the batch has changed."""
        count = len(self.active)
        self._tokens[:count] = torch.tensor([s.token_ids[-1] for s in self.active], device=self.device)
        self._positions[:count] = torch.tensor([s.length - 1 for s in self.active], device=self.device)
        self._sampling = RowSampling.of(self.active, self.decoder.vocab_size, self.device)

    def _append(
        self, rows: list[Sequence], tokens: Tensor, logprobs: Tensor
    ) -> list[tuple[Sequence, GenerationError | None]]:
        """Append sampled tokens [R] and logprobs [R] to their sequences; returns the sequences that have ended."""
        values = logprobs.tolist()
        ended: list[tuple[Sequence, GenerationError | None]] = []
        for sequence, token, logprob in zip(rows, tokens.tolist(), values, strict=True):
            if not math.isfinite(logprob):
                self.decoder.cache.clear_row(sequence.row)
                ended.append((sequence, _not_finite(sequence)))
            elif sequence.append(token, logprob, self.version):
                ended.append((sequence, None))
        self.counters["tokens"] += len(rows)
        if ended:
            self._free([s for s, _ in ended])
        return ended

    def _free(self, gone: list[Sequence]) -> None:
        """Take sequences out of the batch; the last rows move into the holes."""
        cache = self.decoder.cache
        for sequence in gone:
            prompt = sequence.prompt
            if sequence in prompt.holders:
                if len(prompt.holders) == 1 and prompt.num_waiting and prompt.logits is not None:
                    prompt.snapshot = cache.snapshot(sequence.row, len(prompt.token_ids))
                prompt.holders.remove(sequence)
            self._forget_unused(prompt)
        leaving = {s.row for s in gone}
        kept = len(self.active) - len(gone)
        holes = sorted(row for row in leaving if row < kept)
        movers = [s for s in self.active[kept:] if s.row not in leaving]
        if movers:
            cache.copy_rows([s.row for s in movers], holes, max(s.length for s in movers))
        for sequence, hole in zip(movers, holes, strict=True):
            self.active[hole] = sequence
            sequence.row = hole
        del self.active[kept:]
        self._sampling = None


def _known(value: _T | None) -> _T:
    assert value is not None
    return value


def _not_finite(sequence: Sequence) -> GenerationError:
    return GenerationError(
        f"Request {sequence.request.request_id!r}: the model gave a non-finite logit after "
        f"{len(sequence.token_ids)} tokens. The weights of this version are broken (nan or inf); look at the "
        "loss and gradient norm of the last optimizer steps."
    )
