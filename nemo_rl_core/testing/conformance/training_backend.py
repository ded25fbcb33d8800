"""The contract of a training backend.

Each clause is a way in which a step was not the step that was asked for: a loss that depends on how the batch was
cut, neighbours that see each other, a checkpoint that continues elsewhere. The backend is compared with a plain
PyTorch loop over the same tiny checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import attrs
import pytest
import torch

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.protocols.loss import Metric
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import ClusterConfig, SchedulerConfig
from nemo_rl_core.testing.conformance.cases.reference import (
    LargestTensor,
    Likelihood,
    ValuesToOne,
    WeightedLoss,
    forward_logprobs,
    ragged_batch,
    tiny_model,
)
from nemo_rl_core.testing.conformance.cases.training_bench import (
    OPTIMIZER,
    BackendUnderTest,
    Start,
    TrainingBench,
    equal_bits,
    loss_of,
    two_steps,
    weights_of,
    without_mask,
)
from nemo_rl_core.testing.conformance.frame.subject import Expecting, configured
from nemo_rl_core.training.model.metrics import metric_values

__all__ = ["TrainingBackendContract"]

CAPABILITIES = frozenset(
    {
        "tensor_parallel",
        "pipeline_parallel",
        "context_parallel",
        "lora",
        "scalar_head",
        "share_weights",
        "exports_on_every_rank",
        "top_logprobs",
        "over_vocabulary",
        "offload",
    }
)


class TrainingBackendContract(TrainingBench):
    """What every training backend must do. Define the fixture `backend`: the component class.

    Attributes:
        config_options: Options of the component, if the defaults do not suit the kit.
        model_shape: `config.json` of the model that is trained, for a backend that cannot train the default one.
        device: torch device of the backend.
        tolerance: Largest difference of a logprob, a weight or a norm from the plain loop, relative to 1 or its size.
        num_processes: Data-parallel processes that must take the step of one; 0 skips the clause.
    """

    # -- what it says of itself ----------------------------------------------------------------

    def test_declares_itself(self, backend: BackendUnderTest) -> None:
        """It names an attrs class of its options, and only capabilities that exist."""
        component = configured(backend, self.config_options).loaded
        assert attrs.has(component.config_class), f"config_class is {component.config_class!r}, not an attrs class"
        unknown = set(component.capabilities) - CAPABILITIES
        assert not unknown, f"capabilities {sorted(unknown)} are unknown; they are {sorted(CAPABILITIES)}"

    def test_layout(self, backend: BackendUnderTest) -> None:
        """It says of a configuration what makes up a replica, and finds no mistake in the one the kit trains."""
        self.says_its_layout(backend)

    # -- logprobs ------------------------------------------------------------------------------

    def test_logprobs(self, start: Start) -> None:
        """`get_logprobs` is that of a full forward pass, [N] float32 on the CPU, at temperatures 0.6, 1 and 1.3."""
        backend, batch = start(), without_mask(self.batch())
        for temperature in (0.6, 1.0, 1.3):
            found = backend.get_logprobs(batch, temperature)
            kind = (found.dtype, found.device.type, tuple(found.shape), found.requires_grad)
            wanted = (torch.float32, "cpu", (batch.num_tokens,), False)
            assert kind == wanted, f"it returned (dtype, device, shape, requires_grad) {kind}, not {wanted}"
            self.same(found, forward_logprobs(self.tiny.model, batch, temperature), f"logprobs at {temperature}")

    def test_logprobs_of_masked_batches(self, start: Start) -> None:
        """With a `loss_mask` the logprobs of the selected tokens are those of a full forward pass."""
        batch = self.batch()
        found, mask = start().get_logprobs(batch), batch["loss_mask"]
        self.same(found[mask], forward_logprobs(self.tiny.model, batch)[mask], "logprobs of selected tokens")

    def test_logprobs_in_micro_batches(self, start: Start) -> None:
        """However the batch is cut for `get_logprobs`, each logprob stands at its own token."""
        backend, batch = start(), without_mask(self.batch())
        expected = forward_logprobs(self.tiny.model, batch)
        for cut in ([[3, 0], [5], [1, 4, 2]], [[i] for i in range(len(batch))], [[0, 1, 2], [], [3, 4, 5]]):
            self.same(backend.get_logprobs(batch, 1.0, cut), expected, f"logprobs with micro-batches {cut}")

    def test_first_tokens(self, start: Start) -> None:
        """The first token of each sequence, which nothing predicts, has logprob 0."""
        backend, batch = start(), self.batch()
        first, loss = batch.position_ids == 0, WeightedLoss()
        self.step(backend, batch, loss)
        found = {"get_logprobs": backend.get_logprobs(without_mask(batch)), "the loss": loss.seen[0][0].logprobs}
        for where, values in found.items():
            assert values is not None and not values[first].any(), (
                f"a first token has a logprob other than 0 in {where}"
            )

    def test_training_logprobs(self, start: Start) -> None:
        """What the loss sees is what `get_logprobs` says, at the temperature: the ratio of an on-policy step is 1."""
        batch, mask = self.batch(), self.batch()["loss_mask"]
        for temperature in (0.6, 1.0):
            backend, loss = start(), WeightedLoss()
            self.step(backend, batch, loss, temperature=temperature)
            expected = forward_logprobs(self.tiny.model, batch, temperature)[mask]
            seen = loss.seen[0][0].logprobs
            assert seen is not None and seen.requires_grad, "the loss got logprobs without gradient"
            self.same(seen.detach()[mask], expected, f"logprobs of the loss at temperature {temperature}")

    def test_packing(self, start: Start) -> None:
        """Sequences of one micro-batch do not see each other: neighbours change neither logprobs nor the step."""
        batch, other = self.batch(), self.batch(seed=5)
        weights = []
        for neighbours in (batch, other):
            part = BatchedDataDict.concat([neighbours.select([2, 3]), batch.select([0, 1])])
            ours = part.sequence_index >= 2
            part.set_tokens("loss_mask", part["loss_mask"] & ours)
            backend = start()
            found = backend.get_logprobs(without_mask(part), 1.0, [[0, 1, 2, 3]])
            expected = forward_logprobs(self.tiny.model, part)
            self.same(found[ours], expected[ours], "logprobs of sequences behind others")
            self.step(backend, part)
            weights.append(weights_of(backend))
        self.same_weights(weights[1], weights[0], "the step of two sequences, with other neighbours beside them,")

    def test_no_full_logits(self, start: Start) -> None:
        """The [N, V] matrix is never held: logits are computed in chunks of `logprob_chunk_size` tokens."""
        vocab_size = 4096
        tiny = tiny_model({**self.model_shape, "vocab_size": vocab_size})
        backend = start(model_name=tiny.folder, logprob_chunk_size=16)
        batch = ragged_batch((130, 70, 150, 50), vocab_size=vocab_size)
        batch.set_tokens("loss_mask", batch.position_ids > 0)
        full = batch.num_tokens * vocab_size
        work: dict[str, Callable[[], object]] = {
            "get_logprobs": lambda: backend.get_logprobs(without_mask(batch), 1.0, [[0, 1, 2, 3]]),
            "train_step": lambda: self.step(backend, batch),
        }
        for name, run in work.items():
            with LargestTensor() as watch:
                run()
            assert watch.numel < full / 2, (
                f"{name} made a tensor of shape {watch.shape} ({watch.numel} numbers) for {batch.num_tokens} tokens "
                f"and a vocabulary of {vocab_size}"
            )

    # -- what the loss gets --------------------------------------------------------------------

    def test_needs(self, start: Start) -> None:
        """It fills what the loss `needs`, right and at the temperature, and nothing that costs more."""
        batch, temperature = self.batch(), 0.7
        mask, expected = batch["loss_mask"], self.predicted(batch, temperature)
        entropy = -(expected.exp() * expected).sum(-1)
        for needs in ({"logprobs"}, {"logprobs", "entropy"}, {"logprobs", "logits"}, {"logprobs", "entropy", "logits"}):
            loss = WeightedLoss(needs=frozenset(needs))
            self.step(start(), batch, loss, temperature=temperature)
            outputs = loss.seen[0][0]
            missing = [name for name in needs if getattr(outputs, name) is None]
            assert not missing, f"the loss needs {sorted(needs)}; it did not get {missing}"
            assert outputs.logits is None or "logits" in needs, "it filled logits that the loss does not need"
            if outputs.entropy is not None:
                self.same(outputs.entropy.detach()[mask], entropy[mask], "entropy")
            if outputs.logits is not None:
                shape = (batch.num_tokens, self.tiny.vocab_size)
                assert outputs.logits.shape == shape, f"logits have shape {tuple(outputs.logits.shape)}, not {shape}"
                self.same(outputs.logits.detach().log_softmax(-1)[mask], expected[mask], "log-softmax of the logits")

    def test_needs_it_cannot_fill(self, start: Start) -> None:
        """A loss that needs values is refused in words by a model with logits, whose head gives none."""
        loss = WeightedLoss(needs=frozenset({"logprobs", "values"}))
        with Expecting(NemoRLError, "a loss that needs `values`"):
            self.step(start(), self.batch(), loss)

    def test_scalar_head(self, backend: BackendUnderTest, start: Start) -> None:
        """With `head: scalar` it gives one number for each token that no later token and no neighbour changes."""
        made = self.capable(backend, start, "scalar_head", head="scalar")
        batch = without_mask(self.batch())
        found = made.get_values(batch, [[3, 0], [5], [1, 4, 2]])
        kind = (found.dtype, found.device.type, tuple(found.shape), found.requires_grad)
        wanted = (torch.float32, "cpu", (batch.num_tokens,), False)
        assert kind == wanted, f"it returned (dtype, device, shape, requires_grad) {kind}, not {wanted}"
        assert float(found.std()) > 1e-4, "every token has the same value"
        for number, values in enumerate(torch.split(found, batch.lengths.tolist())):
            ids = batch.select([number])["input_ids"]
            prefixes = [BatchedDataDict([n], {"input_ids": ids[:n]}) for n in range(1, len(ids) + 1)]
            read = torch.stack([made.get_values(prefix)[-1] for prefix in prefixes])
            self.same(values, read, f"values of sequence {number}, against those of its prefixes,")

    def test_trains_the_scalar_head(self, backend: BackendUnderTest, start: Start) -> None:
        """A loss gets the values with gradient, and steps bring them to its targets."""
        made, batch, loss = self.capable(backend, start, "scalar_head", head="scalar"), self.batch(), ValuesToOne()
        before = float((made.get_values(batch) - 1)[batch["loss_mask"]].square().mean())
        for _ in range(10):
            self.step(made, batch, loss)
        after = float((made.get_values(batch) - 1)[batch["loss_mask"]].square().mean())
        assert after < before / 2, f"the squared error of the values went from {before:.3g} to {after:.3g} in 10 steps"

    def test_top_logprobs(self, backend: BackendUnderTest, start: Start) -> None:
        """The likeliest tokens and their logprobs are those of a full forward pass, likeliest first."""
        made, batch = self.capable(backend, start, "top_logprobs"), self.batch()
        mask = batch["loss_mask"]
        for temperature in (0.6, 1.0):
            ids, logprobs = made.get_top_logprobs(batch, 3, temperature, [[3, 0], [5], [1, 4, 2]])
            assert ids.shape == logprobs.shape == (batch.num_tokens, 3), f"it returned shape {list(ids.shape)}"
            top = self.predicted(batch, temperature).topk(3, dim=-1)
            self.same(logprobs[mask], top.values[mask], f"logprobs at {temperature}")
            named = self.predicted(batch, temperature).gather(-1, ids)
            self.same(named[mask], top.values[mask], f"logprobs of the named tokens at {temperature}")

    @torch.no_grad()
    def test_hidden_states(self, backend: BackendUnderTest, start: Start) -> None:
        """Hidden states and the output layer together give the distributions of a full forward pass."""
        made, batch = self.capable(backend, start, "over_vocabulary"), self.batch()
        mask = batch["loss_mask"]
        hidden = made.get_hidden_states(batch, [[3, 0], [5], [1, 4, 2]])
        layer = made.get_output_layer()
        assert not hidden[~mask].any(), "hidden states outside of loss_mask are not 0"
        self.same(layer.logprobs(hidden[mask]), self.predicted(batch, 1.0)[mask], "logprobs over the vocabulary")

    def test_loss_over_the_vocabulary(self, backend: BackendUnderTest, start: Start) -> None:
        """A loss of whole distributions has the value and the gradient of the same loss of the tokens' logprobs."""
        made, batch = self.capable(backend, start, "over_vocabulary"), self.batch()
        found, expected = (
            self.step(one, batch, Likelihood(name), temperature=0.8)
            for one, name in ((made, "over_vocabulary"), (start(), "logprobs"))
        )
        self.same(loss_of(found), loss_of(expected), "loss")
        self.same(found.grad_norm, expected.grad_norm, "gradient norm")

    # -- the step ------------------------------------------------------------------------------

    def test_step(self, start: Start) -> None:
        """Three steps are those of the plain loop with AdamW: weights, loss and gradient norm, at temperature 0.8."""
        backend, reference = start(), self.reference()
        for number in range(3):
            batch = self.batch(seed=number)
            found, expected = self.step(backend, batch, temperature=0.8), reference.step(batch, temperature=0.8)
            self.same(loss_of(found), expected.loss, f"loss of step {number + 1}")
            self.same(found.grad_norm, expected.grad_norm, f"gradient norm of step {number + 1}")
        self.same_weights(weights_of(backend), dict(reference.weights()), "after three steps")

    def test_micro_batches(self, start: Start) -> None:
        """Any cut into micro-batches gives the same step."""
        batch = self.batch()
        whole = self.step(first := start(), batch)
        for cut in ([[0], [1], [2], [3], [4], [5]], [[5, 1], [0, 2, 3, 4]]):
            found = self.step(backend := start(), batch, micro_batches=cut)
            self.same(loss_of(found), loss_of(whole), f"loss with micro-batches {cut}")
            self.same(found.grad_norm, whole.grad_norm, f"gradient norm with micro-batches {cut}")
            self.same_weights(weights_of(backend), weights_of(first), f"with micro-batches {cut}")

    def test_empty_micro_batch(self, start: Start) -> None:
        """An empty micro-batch changes nothing, wherever it stands."""
        batch = self.batch()
        self.step(first := start(), batch)
        for cut in ([[], list(range(6))], [[0, 1, 2], [], [3, 4, 5]], [list(range(6)), []]):
            self.step(backend := start(), batch, micro_batches=cut)
            self.same_weights(weights_of(backend), weights_of(first), f"with micro-batches {cut}")

    def test_evaluation(self, start: Start) -> None:
        """With `update=False` it reports the loss and changes nothing: neither weights nor the next step."""
        backend, batch = start(), self.batch()
        before = weights_of(backend)
        evaluated = self.step(backend, batch, update=False)
        assert equal_bits(before, weights_of(backend)), "a step with update=False changed the weights"
        stepped = self.step(backend, batch)
        self.same(loss_of(evaluated), loss_of(stepped), "loss of the evaluation, beside that of the step,")
        self.step(other := start(), batch)
        self.same_weights(weights_of(backend), weights_of(other), "in a step after an evaluation")

    def test_gradient_norm(self, start: Start) -> None:
        """`grad_norm` is the norm of the whole gradient before clipping, whatever the limit."""
        batch = self.batch()
        expected = self.reference().step(batch).grad_norm
        for limit in (None, 0.01 * expected, 100 * expected):
            found = self.step(start(max_grad_norm=limit), batch, micro_batches=[[0, 1, 2], [3, 4, 5]]).grad_norm
            self.same(found, expected, f"gradient norm with max_grad_norm={limit}")

    def test_clipping(self, start: Start) -> None:
        """The gradient is scaled down to `max_grad_norm` before the optimizer sees it, and only if it is larger."""
        for limit in (0.05, 100.0):
            backend, reference = start(max_grad_norm=limit), self.reference(max_grad_norm=limit)
            for number in range(3):
                batch = self.batch(seed=number)
                self.step(backend, batch, micro_batches=[[0, 1, 2], [3, 4, 5]])
                reference.step(batch)
            self.same_weights(weights_of(backend), dict(reference.weights()), f"with max_grad_norm={limit}")

    def test_gradient_scale(self, start: Start) -> None:
        """`gradient_scale` multiplies the gradient, not the loss that is reported."""
        batch = self.batch()
        expected = self.reference().step(batch)
        found = self.step(start(), batch, gradient_scale=3.0)
        self.same(found.grad_norm, 3 * expected.grad_norm, "gradient norm with gradient_scale=3")
        self.same(loss_of(found), expected.loss, "loss with gradient_scale=3")

    def test_learning_rate(self, start: Start) -> None:
        """The rate rises over the warm-up and decays to its end as configured; the one reported is the one used."""
        peak, batch = OPTIMIZER.lr, self.batch()
        for name in ("constant", "linear", "cosine"):
            scheduler = SchedulerConfig(name=name, warmup_steps=2, total_steps=6, min_lr_ratio=0.25)
            backend, reference = start(scheduler=scheduler), self.reference()
            rates = []
            for _ in range(8):
                rates.append(self.step(backend, batch).learning_rate)
                reference.step(batch, learning_rate=rates[-1])
            self.same_weights(weights_of(backend), dict(reference.weights()), f"with the reported rates of {name}", 3)
            end = peak if name == "constant" else 0.25 * peak
            assert rates[0] < rates[1] <= peak * 1.0001, f"{name}: the rate does not rise over 2 warm-up steps: {rates}"
            assert max(rates) == pytest.approx(peak), f"{name}: the peak of {rates} is not optimizer.lr={peak}"
            assert rates[-1] == pytest.approx(end), f"{name}: the rate ends at {rates[-1]}, not at {end}"
            falling = all(a >= b * 0.9999 for a, b in pairwise(rates[2:]))
            assert falling, f"{name}: the rate rises again after the warm-up: {rates}"
            assert name == "constant" or rates[4] > end * 1.01, f"{name}: the rate jumps to its end: {rates}"

    def test_reports(self, start: Start) -> None:
        """It reports the loss's metrics summed over micro-batches, as plain floats, the loss and the tokens it ran."""
        batch = self.batch()
        found = self.step(start(), batch, micro_batches=[[0, 1], [2, 3, 4], [5]])
        plain = all(
            isinstance(m, Metric) and type(m.total) is float and type(m.count) is float for m in found.metrics.values()
        )
        assert plain, f"metrics are not `Metric`s of floats: {found.metrics}"
        mask, logprobs = batch["loss_mask"], forward_logprobs(self.tiny.model, batch)
        expected = {"logprob": logprobs[mask].mean(), "lowest": logprobs[mask].min(), "trained": mask.sum()}
        values = metric_values(found.metrics)
        for name, value in expected.items():
            assert name in values, f"the loss's metric {name!r} is not reported; there are {sorted(values)}"
            self.same(values[name], value, f"metric {name!r}")
        assert "loss" in values, "it reports no `loss`"
        assert found.num_tokens == batch.num_tokens, (
            f"num_tokens is {found.num_tokens}, the batch has {batch.num_tokens}"
        )

    def test_batches_are_left_alone(self, start: Start) -> None:
        """It changes no field of the batch."""
        backend, batch = start(), self.batch()
        before = {name: value.clone() for name, value in batch.tokens.items()}
        self.step(backend, batch)
        backend.get_logprobs(batch)
        assert batch.field_names == before.keys(), "it added or removed a field"
        for name, value in before.items():
            assert torch.equal(batch[name], value), f"it changed `{name}`"

    # -- weights out ---------------------------------------------------------------------------

    def test_exported_weights(self, start: Start) -> None:
        """Exported weights have the names, shapes and values of the Hugging Face model, tied ones once."""
        exported = list(start().export_weights())
        names = [name for name, _ in exported]
        twice = sorted({name for name in names if names.count(name) > 1})
        assert not twice, f"it exports {twice} more than once"
        state = self.tiny.model.state_dict()
        unknown = sorted(set(names) - state.keys())
        assert not unknown, f"the Hugging Face model has no {unknown[:5]}; it has {sorted(state)[:5]}"
        own = self.tiny.weights()
        tied = sorted({name for name in set(names) - own.keys() if len(names) > len(own)})
        assert not tied, f"it exports the tied weight {tied} beside its other name"
        assert len(names) == len(own), f"it exports {len(names)} weights; the model has {len(own)}"
        for name, tensor in exported:
            assert tensor.shape == state[name].shape, (
                f"{name} has shape {list(tensor.shape)}, not {list(state[name].shape)}"
            )
            assert torch.equal(tensor.detach().cpu(), state[name]), (
                f"{name} is not that of the checkpoint it was set up with"
            )

    def test_exports_follow_the_step(self, start: Start) -> None:
        """After a step the exported weights are the new ones, and come back whole from a Hugging Face model."""
        backend = start()
        first = fingerprint(weights_of(backend).items())
        self.step(backend, self.batch())
        exported = weights_of(backend)
        assert fingerprint(exported.items()) != first, "the exported weights are those from before the step"
        loaded = self.tiny.copy()
        loaded.load_state_dict(exported, strict=False)
        own = [(name, parameter.detach()) for name, parameter in loaded.named_parameters()]
        assert fingerprint(own) == fingerprint(exported.items()), "loaded into the Hugging Face model they are others"
        batch = without_mask(self.batch())
        self.same(backend.get_logprobs(batch), forward_logprobs(loaded, batch), "logprobs of the exported weights")

    def test_exported_model(self, start: Start, tmp_path: Path) -> None:
        """`export_model` writes a checkpoint that `from_pretrained` loads and that gives the same logprobs."""
        from transformers import AutoModelForCausalLM

        backend, batch = start(), without_mask(self.batch())
        self.step(backend, self.batch())
        backend.export_model(tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        with torch.no_grad():
            self.same(forward_logprobs(loaded, batch), backend.get_logprobs(batch), "logprobs of the written model")

    # -- checkpoints ---------------------------------------------------------------------------

    def test_checkpoint(self, start: Start, tmp_path: Path) -> None:
        """Saved, loaded into a new backend and continued, it is bit for bit the run that was not interrupted."""
        scheduler = SchedulerConfig(name="linear", warmup_steps=3, total_steps=9)
        whole, saved, other = (start(seed=seed, scheduler=scheduler) for seed in (0, 0, 99))
        batches = [self.batch(seed=number) for number in range(5)]
        for batch in batches:
            last = self.step(whole, batch)
        for batch in batches[:2]:
            self.step(saved, batch)
        saved.save_checkpoint(tmp_path)
        self.step(other, batches[4])
        other.load_checkpoint(tmp_path)
        for backend, name in ((saved, "the run that was saved"), (other, "a new backend that loaded it")):
            for batch in batches[2:]:
                result = self.step(backend, batch)
            assert equal_bits(weights_of(backend), weights_of(whole)), (
                f"{name} has other weights after three more steps"
            )
            assert loss_of(result) == loss_of(last), f"{name} has another loss in its last step"
            assert result.learning_rate == last.learning_rate, f"{name} has another learning rate"

    def test_damaged_checkpoint(self, start: Start, tmp_path: Path) -> None:
        """A checkpoint file that is cut off, changed or missing is a CheckpointError that names the file."""
        backend = start()
        self.step(backend, self.batch())
        backend.save_checkpoint(tmp_path)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        for path in files:
            self.refuses(backend, path, tmp_path, "cut off", lambda data: data[: len(data) // 2])
        middle = largest.stat().st_size // 2
        flipped = lambda data: data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]  # noqa: E731
        self.refuses(backend, largest, tmp_path, "changed in one byte", flipped)
        self.refuses(backend, largest, tmp_path, "missing", None)

    # -- place ---------------------------------------------------------------------------------

    def test_offload(self, start: Start) -> None:
        """`offload` and `reload`, also twice, keep weights and optimizer bit for bit: the next step is the same."""
        backend, other, batch = start(), start(), self.batch()
        for running in (backend, other):
            self.step(running, batch)
        self.leave_and_return(backend)
        assert equal_bits(weights_of(backend), weights_of(other)), "other weights after offload and reload"
        for running in (backend, other):
            self.step(running, batch)
        self.same_weights(weights_of(backend), weights_of(other), "in a step after offload and reload")

    def test_data_parallel(self, backend: BackendUnderTest, start: Start) -> None:
        """Two data-parallel processes take the step of one: loss, gradient norm, weights and logprobs."""
        from nemo_rl_core.infra.workers.local import InProcessGroup, LocalLauncher
        from nemo_rl_core.training.model.policy import Policy

        if self.num_processes == 0:
            pytest.skip("num_processes is 0")
        case, batch = configured(backend, self.config_options), self.batch()
        launcher = LocalLauncher()
        launcher.setup(ClusterConfig(device="cpu", cpus_per_node=self.num_processes))
        spec = WorkerSpec(
            role="policy",
            factory=case.component,
            config=self.policy(case.options, num_workers=self.num_processes),
            num_workers=self.num_processes,
        )
        try:
            found = two_steps(Policy(launcher.launch(spec), token_budget=20), batch)
        finally:
            launcher.shutdown()
        alone = two_steps(Policy(InProcessGroup(start()), token_budget=20), batch)
        for name in ("loss", "grad_norm", "logprob"):
            self.same(found.metrics[name], alone.metrics[name], f"{name} of {self.num_processes} processes")
        self.same(found.logprobs, alone.logprobs, f"logprobs of {self.num_processes} processes")
        self.same_weights(found.weights, alone.weights, f"of {self.num_processes} processes after two steps")

    def test_shutdown(self, start: Start) -> None:
        """`shutdown` may be called twice."""
        backend = start()
        backend.shutdown()
        backend.shutdown()
