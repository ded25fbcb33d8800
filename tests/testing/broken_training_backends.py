"""Training backends that are broken in one thing each, by the clause of the kit that must see it."""

from __future__ import annotations

import sys
from pathlib import Path

import cloudpickle
import torch
from attrs import evolve, frozen

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def configured(change):
    """A backend that takes its configuration for another."""

    class Backend(DTensorBackend):
        def setup(self, config, context):
            super().setup(change(config), context)

    return Backend


def planned(change):
    """A backend that takes each plan for another."""

    class Backend(DTensorBackend):
        def train_step(self, batch, loss_fn, plan):
            return super().train_step(batch, loss_fn, change(plan))

    return Backend


def reporting(change):
    """A backend that reports another result of each step: `change(result, batch)`."""

    class Backend(DTensorBackend):
        def train_step(self, batch, loss_fn, plan):
            return change(super().train_step(batch, loss_fn, plan), batch)

    return Backend


def scoring(change):
    """A backend that returns other logprobs: `change(logprobs, batch, temperature)`."""

    class Backend(DTensorBackend):
        def get_logprobs(self, batch, temperature=1.0, micro_batches=None):
            return change(super().get_logprobs(batch, temperature, micro_batches), batch, temperature)

    return Backend


def showing(change):
    """A backend that shows the loss other outputs: `change(outputs, batch)`."""

    class Shown:
        def __init__(self, loss):
            self.loss, self.needs = loss, loss.needs

        def __call__(self, outputs, batch):
            return self.loss(change(outputs, batch), batch)

    class Backend(DTensorBackend):
        def train_step(self, batch, loss_fn, plan):
            return super().train_step(batch, Shown(loss_fn), plan)

    return Backend


def exporting(change):
    """A backend that exports other weights."""

    class Backend(DTensorBackend):
        def export_weights(self):
            yield from change(list(super().export_weights()))

    return Backend


class Telepathic(DTensorBackend):
    capabilities = DTensorBackend.capabilities | {"telepathy"}


class WithoutConfigClass(DTensorBackend):
    config_class = dict


class IgnoresTemperature(DTensorBackend):
    def get_logprobs(self, batch, temperature=1.0, micro_batches=None):
        return super().get_logprobs(batch, 1.0, micro_batches)


class IgnoresTheCut(DTensorBackend):
    """Returns the logprobs in the order in which it computed them."""

    def get_logprobs(self, batch, temperature=1.0, micro_batches=None):
        found = super().get_logprobs(batch, temperature, micro_batches)
        if micro_batches is None:
            return found
        order = [i for part in micro_batches for i in part]
        pieces = torch.split(found, batch.lengths.tolist())
        return torch.cat([pieces[i] for i in order])


def joined(batch):
    """The batch as one sequence."""
    return BatchedDataDict([batch.num_tokens], batch.tokens)


class LeakingLogprobs(DTensorBackend):
    def get_logprobs(self, batch, temperature=1.0, micro_batches=None):
        found = super().get_logprobs(joined(batch), temperature)
        return found.masked_fill(batch.position_ids == 0, 0.0)


class LeakingSteps(DTensorBackend):
    def train_step(self, batch, loss_fn, plan):
        return super().train_step(joined(batch), loss_fn, evolve(plan, micro_batches=[[0]]))


class DividesByMicroBatches(DTensorBackend):
    """Averages the gradient over the micro-batches of a loss that is divided already."""

    def train_step(self, batch, loss_fn, plan):
        scale = plan.gradient_scale / len(plan.micro_batches)
        return super().train_step(batch, loss_fn, evolve(plan, gradient_scale=scale))


class ForgetsAllButTheLast(DTensorBackend):
    """Leaves out the gradient of micro-batches but the last."""

    def _micro_batch(self, *args):
        for parameter in self.parameters:
            parameter.grad = None
        return super()._micro_batch(*args)


class TripsOverEmpty(DTensorBackend):
    def _micro_batch(self, batch, *rest):
        if len(batch) == 0:
            raise IndexError("no sequence")
        return super()._micro_batch(batch, *rest)


class StopsAtEmpty(DTensorBackend):
    def train_step(self, batch, loss_fn, plan):
        parts = list(plan.micro_batches)
        if [] in parts:
            parts = parts[: parts.index([])]
        return super().train_step(batch, loss_fn, evolve(plan, micro_batches=parts))


class ReportsTheClippedNorm(DTensorBackend):
    def train_step(self, batch, loss_fn, plan):
        found = super().train_step(batch, loss_fn, plan)
        return evolve(found, grad_norm=min(found.grad_norm, self.config.max_grad_norm or found.grad_norm))


class ClipsEachMicroBatch(DTensorBackend):
    def _micro_batch(self, *args):
        found = super()._micro_batch(*args)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        return found


class ScalesTheLoss(DTensorBackend):
    def train_step(self, batch, loss_fn, plan):
        found = super().train_step(batch, loss_fn, plan)
        loss = found.metrics["loss"]
        metrics = {**found.metrics, "loss": evolve(loss, total=loss.total * plan.gradient_scale)}
        return evolve(found, metrics=metrics)


class UsesHalfTheRate(DTensorBackend):
    def train_step(self, batch, loss_fn, plan):
        self.optimizer.param_groups[0]["lr"] /= 2
        found = super().train_step(batch, loss_fn, plan)
        return evolve(found, learning_rate=found.learning_rate * 2)


class Relabels(DTensorBackend):
    def train_step(self, batch, loss_fn, plan):
        found = super().train_step(batch, loss_fn, plan)
        batch.tokens["advantages"].zero_()
        return found


class AddsAField(DTensorBackend):
    def get_logprobs(self, batch, temperature=1.0, micro_batches=None):
        found = super().get_logprobs(batch, temperature, micro_batches)
        batch.set_tokens("logprobs", found)
        return found


class ExportsTheFirstWeights(DTensorBackend):
    def setup(self, config, context):
        super().setup(config, context)
        self.first = [(name, tensor.clone()) for name, tensor in super().export_weights()]

    def export_weights(self):
        yield from self.first


class WritesTheFirstModel(ExportsTheFirstWeights):
    def export_weights(self):
        yield from DTensorBackend.export_weights(self)

    def export_model(self, path):
        self.model.save_pretrained(path, state_dict=dict(self.first))


class WritesOnlyWeights(DTensorBackend):
    def export_model(self, path):
        super().export_model(path)
        (Path(path) / "config.json").unlink()


class ForgetsTheOptimizer(DTensorBackend):
    def load_checkpoint(self, path):
        super().load_checkpoint(path)
        for state in self.optimizer.state.values():
            state["exp_avg"].zero_()


class ForgetsTheSchedule(DTensorBackend):
    def load_checkpoint(self, path):
        last = self.scheduler.last_epoch, [g["lr"] for g in self.optimizer.param_groups]
        super().load_checkpoint(path)
        self.scheduler.last_epoch = last[0]
        for group, rate in zip(self.optimizer.param_groups, last[1], strict=True):
            group["lr"] = rate


class SavingMovesOn(DTensorBackend):
    def save_checkpoint(self, path):
        super().save_checkpoint(path)
        self.scheduler.step()


class NamesNoFile(DTensorBackend):
    def load_checkpoint(self, path):
        try:
            super().load_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError("a file is damaged") from error


class RaisesWhatItMeets(DTensorBackend):
    def load_checkpoint(self, path):
        try:
            super().load_checkpoint(path)
        except CheckpointError as error:
            raise RuntimeError(str(error)) from error


class ReadsAnything(DTensorBackend):
    """Does not look at the checksums."""

    def load_checkpoint(self, path):
        file = Path(path) / self.ranks.file_name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        try:
            self._restore(torch.load(file, weights_only=True))
        except Exception as error:
            raise CheckpointError(f"{file} cannot be read") from error


class LosesItsMomenta(DTensorBackend):
    offload = lambda self: self.optimizer.state.clear()  # noqa: E731


class LosesBits(DTensorBackend):
    offload = lambda self: self.parameters[0].data.copy_(self.parameters[0].data.bfloat16())  # noqa: E731


class LosesItsMomentaInEachStep(DTensorBackend):
    def train_step(self, batch, loss_fn, plan):
        self.optimizer.state.clear()
        return super().train_step(batch, loss_fn, plan)


class AveragesOverRanks(DTensorBackend):
    """As with a reduction that averages, and a factor that was forgotten."""

    def train_step(self, batch, loss_fn, plan):
        scale = plan.gradient_scale / self.parallel_axes()["dp"]
        return super().train_step(batch, loss_fn, evolve(plan, gradient_scale=scale))


class ShutsDownOnce(DTensorBackend):
    gone = 0

    def shutdown(self):
        super().shutdown()
        self.gone += 1
        if self.gone == 2:
            raise RuntimeError("was shut down already")


class FillsValues(DTensorBackend):
    """Leaves out what it cannot fill, without a word."""

    def train_step(self, batch, loss_fn, plan):
        inner = type("Loss", (), {"__call__": lambda _, *args: loss_fn(*args)})()
        inner.needs = frozenset(loss_fn.needs) - {"values"}
        return super().train_step(batch, inner, plan)


class ReversesTheValues(DTensorBackend):
    def get_values(self, batch, micro_batches=None):
        return super().get_values(batch, micro_batches).flip(0)


class ValuesOfTheSequence(DTensorBackend):
    """The last token's value at each token, as a reward model of whole sequences might have it."""

    def get_values(self, batch, micro_batches=None):
        found = super().get_values(batch, micro_batches)
        return batch.expand_to_tokens(found[batch.offsets[1:] - 1])


class FreezesTheHead(DTensorBackend):
    """Gives the loss values without gradient."""

    def train_step(self, batch, loss_fn, plan):
        def detached(outputs, part):
            if outputs.values is not None:
                outputs.values = outputs.values.detach() + 0 * outputs.values
            return loss_fn(outputs, part)

        inner = type("Loss", (), {"__call__": lambda _, *args: detached(*args)})()
        inner.needs = loss_fn.needs
        return super().train_step(batch, inner, plan)


class TopOfTheLogits(DTensorBackend):
    """Forgets to divide by the temperature."""

    def get_top_logprobs(self, batch, k, temperature=1.0, micro_batches=None):
        return super().get_top_logprobs(batch, k, 1.0, micro_batches)


class TopOfTheNextToken(DTensorBackend):
    """What follows each token in place of what stands there."""

    def get_top_logprobs(self, batch, k, temperature=1.0, micro_batches=None):
        ids, logprobs = super().get_top_logprobs(batch, k, temperature, micro_batches)
        return ids.roll(-1, 0), logprobs.roll(-1, 0)


def renamed(weights):
    return [(f"module.{name}", tensor) for name, tensor in weights]


class StatesOfTheNextToken(DTensorBackend):
    """At each token the state that has read it, not the one that predicts it."""

    def get_hidden_states(self, batch, micro_batches=None):
        return super().get_hidden_states(batch, micro_batches).roll(-1, 0) * batch["loss_mask"][:, None]


class StatesOfAllTokens(DTensorBackend):
    def get_hidden_states(self, batch, micro_batches=None):
        everywhere = batch.select(range(len(batch)))
        everywhere.set_tokens("loss_mask", batch.position_ids > 0)
        return super().get_hidden_states(everywhere, micro_batches)


class HalvesTheLayer(DTensorBackend):
    def get_output_layer(self):
        layer = super().get_output_layer()
        return evolve(layer, weight=layer.weight / 2)


@frozen(kw_only=True)
class OneWorkerOptions(DTensorConfig):
    def layout(self, policy):
        return {}


BROKEN = {
    "declares_itself": (Telepathic, WithoutConfigClass),
    "logprobs": (
        IgnoresTemperature,
        scoring(lambda x, batch, t: x.double()),
        scoring(lambda x, batch, t: x.roll(-1)),
        configured(lambda c: evolve(c, precision="bfloat16")),
    ),
    "layout": (type("OneWorker", (DTensorBackend,), {"config_class": OneWorkerOptions}),),
    "logprobs_of_masked_batches": (
        scoring(lambda x, batch, t: x * ~batch["loss_mask"] if "loss_mask" in batch else x),
    ),
    "logprobs_in_micro_batches": (IgnoresTheCut,),
    "first_tokens": (
        scoring(lambda x, batch, t: x - (batch.position_ids == 0).float()),
        showing(lambda o, batch: evolve(o, logprobs=o.logprobs - (batch.position_ids == 0).float())),
    ),
    "training_logprobs": (
        planned(lambda p: evolve(p, temperature=1.0)),
        showing(lambda o, batch: evolve(o, logprobs=torch.nn.functional.dropout(o.logprobs, 0.1))),
        showing(lambda o, batch: evolve(o, logprobs=o.logprobs.detach())),
    ),
    "packing": (LeakingLogprobs, LeakingSteps),
    "no_full_logits": (configured(lambda c: evolve(c, logprob_chunk_size=100_000)),),
    "needs": (
        showing(lambda o, batch: evolve(o, entropy=None)),
        showing(lambda o, batch: o if o.entropy is None else evolve(o, entropy=-o.entropy)),
        showing(lambda o, batch: o if o.logits is None else evolve(o, logits=o.logits * 0.7)),
        showing(lambda o, batch: evolve(o, logits=torch.zeros(batch.num_tokens, 104))),
    ),
    "needs_it_cannot_fill": (FillsValues,),
    "scalar_head": (ReversesTheValues, ValuesOfTheSequence),
    "trains_the_scalar_head": (FreezesTheHead,),
    "top_logprobs": (TopOfTheLogits, TopOfTheNextToken),
    "hidden_states": (StatesOfTheNextToken, StatesOfAllTokens, HalvesTheLayer),
    "loss_over_the_vocabulary": (
        showing(
            lambda o, batch: o if o.over_vocabulary is None else evolve(o, over_vocabulary=o.over_vocabulary.roll(1, 0))
        ),
        showing(
            lambda o, batch: o if o.over_vocabulary is None else evolve(o, over_vocabulary=o.over_vocabulary.detach())
        ),
        showing(lambda o, batch: o if o.over_vocabulary is None else evolve(o, over_vocabulary=2 * o.over_vocabulary)),
    ),
    "step": (
        configured(lambda c: evolve(c, optimizer=evolve(c.optimizer, weight_decay=0.0))),
        configured(lambda c: evolve(c, optimizer=evolve(c.optimizer, betas=(0.9, 0.95)))),
        configured(lambda c: evolve(c, optimizer=evolve(c.optimizer, name="torch.optim.Adam"))),
        planned(lambda p: evolve(p, temperature=1.0)),
        LosesItsMomentaInEachStep,
    ),
    "micro_batches": (DividesByMicroBatches, ForgetsAllButTheLast),
    "empty_micro_batch": (TripsOverEmpty, StopsAtEmpty),
    "evaluation": (planned(lambda p: evolve(p, update=True)),),
    "gradient_norm": (ReportsTheClippedNorm, ForgetsAllButTheLast),
    "clipping": (
        configured(lambda c: evolve(c, max_grad_norm=None)),
        configured(lambda c: evolve(c, max_grad_norm=1.0)),
        ClipsEachMicroBatch,
    ),
    "gradient_scale": (planned(lambda p: evolve(p, gradient_scale=1.0)), ScalesTheLoss),
    "learning_rate": (
        configured(lambda c: evolve(c, scheduler=evolve(c.scheduler, name="constant"))),
        configured(lambda c: evolve(c, scheduler=evolve(c.scheduler, warmup_steps=0))),
        configured(lambda c: evolve(c, scheduler=evolve(c.scheduler, min_lr_ratio=0.0))),
        configured(lambda c: evolve(c, scheduler=evolve(c.scheduler, total_steps=4))),
        UsesHalfTheRate,
    ),
    "reports": (
        reporting(lambda r, batch: evolve(r, num_tokens=0)),
        reporting(lambda r, batch: evolve(r, metrics={"loss": r.metrics["loss"]})),
        reporting(lambda r, batch: evolve(r, metrics={**r.metrics, "x": 3.0})),
    ),
    "batches_are_left_alone": (Relabels, AddsAField),
    "exported_weights": (
        exporting(renamed),
        exporting(lambda w: [*w, w[0]]),
        exporting(lambda w: [*w, ("lm_head.weight", w[0][1])]),
        exporting(lambda w: w[1:]),
        exporting(lambda w: [(name, tensor.flatten()) for name, tensor in w]),
        exporting(lambda w: [(name, tensor * 1.001) for name, tensor in w]),
    ),
    "exports_follow_the_step": (ExportsTheFirstWeights, exporting(renamed)),
    "exported_model": (WritesTheFirstModel, WritesOnlyWeights),
    "checkpoint": (ForgetsTheOptimizer, ForgetsTheSchedule, SavingMovesOn),
    "damaged_checkpoint": (NamesNoFile, RaisesWhatItMeets, ReadsAnything),
    "offload": (LosesItsMomenta, LosesBits),
    "data_parallel": (AveragesOverRanks,),
    "shutdown": (ShutsDownOnce,),
}
