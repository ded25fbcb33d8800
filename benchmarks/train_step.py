"""Train step of the dtensor backend against a hand-written PyTorch loop.

Both run the same model on the same packed micro-batches with the same packed attention, chunk-free in the bare loop:
hidden states, output layer, log-softmax, loss, backward, gradient clipping, fused AdamW. The bare loop is given its
tensors ready made; the backend starts from the ragged batch. Sharing of prefixes is off, so that both run the same
tokens. Repeats alternate, and the median of the paired ratios
(bare time / our time) is reported: 1.0 means that the framework costs nothing. With `--clock cpu` (and one thread)
processor time is taken instead of wall time, which other load on the machine does not touch.

    python benchmarks/train_step.py [--steps 9] [--threads 2] [--clock wall] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_rl_core.models import load_model
from nemo_rl_core.models.numerics.packed_attention import Packing
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.protocols.loss import LossSums, Metric, ModelOutputs
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import OptimizerConfig, PolicyConfig
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_dtensor.attention import ATTENTION_NAME
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig

RESULTS = Path(__file__).parent / "results" / "train_step.json"
LR = 1e-5


class PolicyGradient:
    """-sum(advantage * logprob): the cheapest loss of the field, so that the rest is what is measured."""

    denominator = "tokens"
    needs = frozenset({"logprobs"})

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over trained tokens."""
        assert outputs.logprobs is not None
        terms = -(outputs.logprobs * batch["advantages"]) * batch["loss_mask"]
        return LossSums(
            terms.sum(), {"mean_logprob": Metric(outputs.logprobs.detach().sum(), batch["loss_mask"].sum())}
        )


def make_batch(num_sequences: int, vocab: int, *, seed: int = 0) -> BatchedDataDict:
    """Prompts of 16 to 32 tokens with completions of 8 to 150, as a rollout batch has them."""
    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(16, 33, (num_sequences,), generator=rng)
    lengths = prompts + torch.randint(8, 151, (num_sequences,), generator=rng)
    batch = BatchedDataDict(lengths)
    total = batch.num_tokens
    batch.set_tokens("input_ids", torch.randint(3, vocab, (total,), generator=rng))
    batch.set_tokens("loss_mask", batch.position_ids >= batch.expand_to_tokens(prompts))
    batch.set_tokens("advantages", torch.randn(total, generator=rng))
    return batch


class BareLoop:
    """What one would write by hand for exactly this model and these micro-batches."""

    def __init__(self, model_name: str, micro_batches: list[BatchedDataDict], num_trained: int, device: str) -> None:
        self.model: Any = load_model(model_name, dtype=torch.float32, attn_implementation=ATTENTION_NAME).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.01, fused=True)
        self.num_trained = num_trained
        self.inputs = []
        for batch in micro_batches:
            packing = Packing.of(batch.lengths.tolist()).to(device)
            where = batch["loss_mask"].nonzero().squeeze(1)
            self.inputs.append(
                (
                    batch["input_ids"][None].to(device),
                    packing.position_ids[None],
                    packing,
                    (where - 1).to(device),
                    batch["input_ids"][where].to(device),
                    batch["advantages"][where].to(device),
                )
            )

    def step(self) -> float:
        """One optimizer step; returns the loss."""
        total = 0.0
        for ids, positions, packing, before, targets, advantages in self.inputs:
            hidden = self.model.model(
                input_ids=ids, position_ids=positions, use_cache=False, packing=packing
            ).last_hidden_state[0]
            logits = self.model.lm_head(hidden[before])
            logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
            loss = -(logprobs * advantages).sum() / self.num_trained
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def compare(
    model_name: str, *, num_sequences: int, budget: int, steps: int, device: str, clock: Callable[[], float]
) -> dict[str, Any]:
    """Alternate steps of both and take the median of the paired ratios."""
    backend = DTensorBackend()
    backend.setup(
        PolicyConfig(
            model_name=model_name,
            options=DTensorConfig(attention="packed", share_prefixes=False),
            optimizer=OptimizerConfig(lr=LR),
        ),
        WorkerContext(device=device),
    )
    batch = make_batch(num_sequences, 100)
    plan: list[list[int]] = [[]]
    used = 0
    for i, length in enumerate(batch.lengths.tolist()):
        if used + length > budget and plan[-1]:
            plan.append([])
            used = 0
        plan[-1].append(i)
        used += length
    counts = count_trained(batch)
    bare = BareLoop(model_name, [batch.select(p) for p in plan], counts.tokens, device)
    loss = NormalizedLoss(PolicyGradient(), counts)

    def ours() -> float:
        return float(backend.train_step(batch, loss, StepPlan(micro_batches=plan)).metrics["loss"].total)

    def timed(step: Any) -> tuple[float, float]:
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        value = step()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start, value

    first = (timed(bare.step)[1], timed(ours)[1])
    assert abs(first[0] - first[1]) < 1e-4 * max(1.0, abs(first[0])), f"the losses differ: {first}"
    pairs = []
    for i in range(steps):
        order = (bare.step, ours) if i % 2 == 0 else (ours, bare.step)
        found = {step: timed(step)[0] for step in order}
        pairs.append((found[bare.step], found[ours]))
    ratios = [b / o for b, o in pairs]
    parameters = sum(p.numel() for p in bare.model.parameters())
    return {
        "model": model_name,
        "parameters": parameters,
        "tokens": batch.num_tokens,
        "trained_tokens": counts.tokens,
        "micro_batches": len(plan),
        "bare_s": round(statistics.median(b for b, _ in pairs), 4),
        "ours_s": round(statistics.median(o for _, o in pairs), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 3) for r in ratios],
        "tokens_per_s": round(batch.num_tokens / statistics.median(o for _, o in pairs)),
    }


def main() -> None:
    """Run the comparison and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    rows = [
        compare(name, num_sequences=n, budget=4096, steps=arguments.steps, device=arguments.device, clock=clock)
        for name, n in (("scratch:qwen2-1m", 64), ("scratch:qwen2-10m", 32))
    ]
    for row in rows:
        print(
            f"{row['model']:>20} {row['tokens']:>6} tokens  bare {row['bare_s']:.3f} s  ours {row['ours_s']:.3f} s  "
            f"ratio {row['ratio']:.3f}"
        )
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else platform.processor() or platform.machine()
    RESULTS.parent.mkdir(exist_ok=True)
    found = {
        "torch": torch.__version__,
        "device": device,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "budget": 0.95,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
