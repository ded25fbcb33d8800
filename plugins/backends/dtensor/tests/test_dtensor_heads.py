"""A scalar head in place of the vocabulary, and the likeliest tokens: against plain Hugging Face models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.protocols.loss import LossSums
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import OptimizerConfig, PolicyConfig
from nemo_rl_plugins_dtensor.backend import DTensorBackend

MODEL = "scratch:qwen2-tiny"
LENGTHS = [5, 7, 3]


def backend(head="lm", **options):
    made = DTensorBackend()
    config = PolicyConfig(model_name=MODEL, head=head, optimizer=OptimizerConfig(lr=1e-2), options=options)
    made.setup(config, WorkerContext(num_threads=1))
    return made


def batch():
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    made = BatchedDataDict(LENGTHS, {"input_ids": torch.randint(3, 90, (n,), generator=generator)})
    made.set_tokens("loss_mask", made.position_ids > 0)
    return made


class Squares:
    """Pulls every value towards 1."""

    needs = frozenset({"values"})

    def __call__(self, outputs, batch):
        return LossSums((outputs.values[batch["loss_mask"]] - 1).square().sum())


def expected_values(model, data):
    rows = [model.model(input_ids=ids[None]).last_hidden_state for ids in data.unpack("input_ids")]
    return torch.cat([model.score(row)[0, :, 0] for row in rows])


@pytest.mark.parametrize("attention", ["packed", "padded"])
@torch.no_grad()
def test_values_are_those_of_a_sequence_classifier_at_each_token(attention):
    data = batch()
    found = backend("scalar", attention=attention).get_values(data, [[2, 0], [1]])
    plain = load_model(MODEL, dtype=torch.float32, head="scalar")
    torch.testing.assert_close(found, expected_values(plain, data), atol=1e-5, rtol=1e-5)


def test_a_scalar_head_is_trained_and_exported_as_a_sequence_classifier(tmp_path):
    made, data = backend("scalar"), batch()
    losses = [
        float(made.train_step(data, Squares(), StepPlan(micro_batches=[[0, 1], [2]])).metrics.get("loss", 0.0))
        for _ in range(20)
    ]
    assert len(losses) == 20
    after = made.get_values(data)
    assert (after - 1).square().mean() < 0.1
    made.export_model(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    with torch.no_grad():
        torch.testing.assert_close(after, expected_values(loaded, data), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_the_model_at_the_temperature(temperature):
    data = batch()
    ids, logprobs = backend().get_top_logprobs(data, 4, temperature, [[1], [0, 2]])
    plain = load_model(MODEL, dtype=torch.float32)
    rows = [plain(input_ids=row[None]).logits[0, :-1] / temperature for row in data.unpack("input_ids")]
    top = torch.cat([torch.log_softmax(row, -1) for row in rows]).topk(4, dim=-1)
    inside = data["loss_mask"]
    assert torch.equal(ids[inside], top.indices)
    torch.testing.assert_close(logprobs[inside], top.values, atol=1e-5, rtol=1e-5)
    assert not logprobs[~inside].any()


def test_more_tokens_than_the_vocabulary_has_are_all_of_it():
    ids, logprobs = backend().get_top_logprobs(batch(), 10_000)
    assert ids.shape == logprobs.shape == (sum(LENGTHS), 104)


def test_asking_a_head_for_what_it_does_not_give_says_what_it_gives():
    with pytest.raises(ConfigError, match=r"does not give logprobs.*head='scalar' it gives values"):
        backend("scalar").get_logprobs(batch())
    with pytest.raises(ConfigError, match=r"does not give values.*head='lm'"):
        backend().train_step(batch(), Squares(), StepPlan(micro_batches=[[0, 1, 2]]))
