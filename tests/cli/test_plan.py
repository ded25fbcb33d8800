"""`nemo-rl plan`: predictions that can be worked out by hand, rates of a run, mistakes."""

from __future__ import annotations

import json
import signal

import pytest

from nemo_rl_core.cli import main
from nemo_rl_core.planning.rates import rates_from_run

CONFIG = """
algorithm: grpo
model: scratch:qwen2-1m
num_prompts_per_step: 4
num_generations_per_prompt: 2
policy: {num_workers: 2, max_sequence_length: 1024, max_tokens_per_microbatch: 1024}
generation: {max_new_tokens: 512}
loss: {name: clipped_pg, options: {correction: tis, correction_max: 2.0}}
"""
RATES = ["--engine-tokens-per-s", "100", "--trainer-tokens-per-s", "50", "--response-tokens", "100"]
EXACT = [*RATES, "--response-spread", "0", "--engine-batch", "8"]
APART = ["cluster.colocated=false", "cluster.roles={policy: 2, generation: 1}"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return "run.yaml"


def test_steps_by_hand(config, capsys):
    assert main(["plan", config, *APART, *EXACT, "--staleness", "0", "--staleness", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    synchronous, asynchronous = found["runs"]
    # 8 responses of 100 tokens: 8 s on one engine of 100/s, 8 s on two trainers of 50/s
    assert synchronous["step_s"] == pytest.approx(16)
    assert synchronous["trainer_idle"] == synchronous["engine_idle"] == pytest.approx(0.5)
    assert asynchronous["step_s"] == pytest.approx(8)
    assert asynchronous["trainer_idle"] == pytest.approx(0) and asynchronous["engine_idle"] == pytest.approx(0)
    assert (asynchronous["bound_s"], asynchronous["efficiency"]) == (pytest.approx(8), pytest.approx(1))
    assert asynchronous["age_max"] == 1
    assert main(["plan", config, *EXACT, "--staleness", "1", "--json"]) == 0
    (shared,) = json.loads(capsys.readouterr().out)["runs"]  # on the same devices nothing overlaps
    assert (shared["step_s"], shared["bound_s"]) == (pytest.approx(16), pytest.approx(16))


def test_engines_are_those_of_the_run(config, capsys):
    tensor = ["generation.backend=vllm", "generation.options.tensor_parallel_size=2", "cluster.launcher=ray"]
    roles = ["cluster.colocated=false", "cluster.roles={policy: 2, generation: 8}"]
    for settings, expected in (
        (roles, (8, 1, False)),
        ([*roles, *tensor], (4, 2, False)),
        ([*tensor, "generation.num_workers=3"], (3, 2, True)),
        (tensor, (1, 2, True)),
    ):
        assert main(["plan", config, *settings, *EXACT, "--json"]) == 0
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        assert (run["num_engines"], run["devices_per_engine"], run["shares_devices"]) == expected


def test_waiting_for_requests_before_new_weights_costs_time(config, capsys):
    """With long tails a refit between requests leaves the engine's places empty."""
    spread = [*APART, *RATES, "--response-spread", "1", "--engine-batch", "8", "--sequence-tokens-per-s", "15"]
    steps = {}
    for how in ("in_flight", "between"):
        settings = [f"rollouts.weight_updates={how}", "generation.backend=vllm", "rollouts.staleness=2"]
        assert main(["plan", config, *settings, *spread, "rollouts.order=ready_first", "--json"]) == 0
        steps[how] = json.loads(capsys.readouterr().out)["runs"][0]["step_s"]
    assert steps["between"] > 1.1 * steps["in_flight"]


def test_memory_by_hand(config, capsys):
    assert main(["plan", config, *EXACT, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory_bytes"]
    from nemo_rl_core.models import load_model_config

    shape = load_model_config("scratch:qwen2-1m")
    # weights, gradients and two moments in 4 bytes, over two workers
    assert memory["trainer_weights"] == memory["num_parameters"] * 16 / 2
    heads = shape.num_key_value_heads * (
        getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    )
    assert memory["sharing"] == "in_turn"
    trainer, engine = memory["trainer"], memory["engine"]
    refit = memory["trainer_weights"] + memory["engine_weights"]  # both sides hold weights then, and nothing else
    assert memory["device"] == max(trainer, engine, refit)
    for staleness in (["cluster.offload=never"], ["rollouts.staleness=1", "loss.options.correction=tis"]):
        assert main(["plan", config, *staleness, *EXACT, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory_bytes"]["device"] == trainer + engine
    assert main(["plan", config, *APART, *EXACT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"]["device"] == max(trainer, engine)
    token = 2 * shape.num_hidden_layers * heads * 4
    assert memory["engine_cache_longest"] == 8 * 1024 * token
    assert memory["engine_cache"] == 8 * 50 * token  # responses of 100 tokens, on average half of it there


def test_memory_counts_every_model_and_divides_engines(config, capsys):
    """bfloat16 with float32 masters: 16 bytes a parameter over two workers, and a reference of 2."""
    kl = ["policy.precision=bfloat16", "loss.options.reference_kl_beta=0.1", *APART]
    tensor = ["generation.backend=vllm", "generation.options.tensor_parallel_size=2"]
    kl[-1] = "cluster.roles={policy: 2, reference: 2, generation: 2}"
    assert main(["plan", config, *kl, *tensor, *EXACT, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory_bytes"]
    count = memory["num_parameters"]
    policy, reference = memory["models"]["policy"], memory["models"]["reference"]
    assert policy["weights"] + policy["gradients"] + policy["optimizer"] == count * 16 / 2
    assert (reference["weights"], reference["gradients"], reference["optimizer"]) == (count, 0, 0)
    assert memory["engine_weights"] == count * 2 / 2
    lora = [*kl, "policy.options={lora: {rank: 8}}"]
    assert main(["plan", config, *lora, *EXACT, "--device-memory-gib", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "worker of reference" not in out  # it is the policy without its adapters
    assert "which does not fit in 0.001 GiB" in out.replace("\n", " ")


def test_the_table_says_what_stands_in_the_way(config, capsys):
    few = ["rollouts.max_in_flight=4", *EXACT[:2], "--trainer-tokens-per-s", "10", *EXACT[4:]]
    assert main(["plan", config, *few]) == 0
    out = capsys.readouterr().out
    assert "4 prompts x 2 rollouts a step; 1 engine, 2 training workers on the same devices" in out
    assert "rollouts.max_in_flight=4 leaves places of the engines empty" in out
    assert "Training is the slower side by 5.0x" in out


def test_more_engines_are_faster(config, capsys):
    steps = []
    for engines in ("1", "4"):
        assert main(["plan", config, *EXACT, "--engines", engines, "--json"]) == 0
        steps.append(json.loads(capsys.readouterr().out)["runs"][0]["step_s"])
    assert steps == [pytest.approx(16), pytest.approx(10)]


def write_metrics(folder, **changes):
    step = {
        "timing/step": 12.0, "timing/train": 3.5, "timing/logprobs": 0.5, "timing/refit": 0.25,
        "timing/build_batch": 0.1, "rollouts/num": 8.0, "rollouts/response_tokens_mean": 100.0,
        "rollouts/turns_mean": 1.0, "performance/tokens_per_s": 100.0, "async/engine_idle_s": 4.0,
        "async/engine_idle_fraction": 1 / 3, "timing/rollout_environment_mean_s": 0.5, **changes,
    }  # fmt: skip
    warm = {**step, "timing/train": 50.0, "step": 1}
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(m) for m in (warm, {**step, "step": 2})) + "\n")
    (folder / "config.json").write_text(json.dumps({"policy": {"num_workers": 2}}))


def test_rates_of_a_run(tmp_path, config, capsys):
    write_metrics(tmp_path)
    rates = rates_from_run(tmp_path)
    assert rates["trainer_tokens_per_s"] == pytest.approx(1200 / 4 / 2)  # 1,200 tokens in 4 s on 2 workers
    assert rates["engine_tokens_per_s"] == pytest.approx(800 / 8)  # 800 new tokens in the 8 s that it had requests
    assert rates["prompt_tokens"] == pytest.approx(50)
    assert (rates["refit_s"], rates["environment_s"], rates["turns"]) == (0.25, 0.5, 1)
    assert main(["plan", config, "--rates-from", str(tmp_path), "--engine-tokens-per-s", "400", "--json"]) == 0
    used = json.loads(capsys.readouterr().out)["rates"]
    assert (used["engine_tokens_per_s"], used["response_tokens"]) == (400, 100)


def test_rates_of_several_engines_turns_and_refused_groups(tmp_path, config, capsys):
    refusing = {"rollouts/num_groups": 4.0, "rollouts/discarded_groups": 2.0}
    changes = {"generation/engines": 4.0, "rollouts/turns_mean": 2.5, "rollouts/num": 8.0, **refusing}
    write_metrics(tmp_path, **changes)
    rates = rates_from_run(tmp_path)
    assert rates["engine_tokens_per_s"] == pytest.approx(800 / 8 / 4)  # each of four
    assert (rates["turns"], rates["response_tokens"], rates["refused_groups"]) == (2.5, 40, 0.5)
    assert rates["prompt_tokens"] == pytest.approx(1200 / 4 - 100)  # the batch holds half of the rollouts
    exact = ["--rates-from", str(tmp_path), "--response-spread", "0", "num_prompts_per_step=64", "--json"]
    assert main(["plan", config, *exact]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    sampled = run["tokens_per_s"] * run["step_s"]
    assert sampled == pytest.approx(2 * 64 * 2 * 100, rel=0.15)  # twice the groups, 2.5 turns of 40 tokens


def test_slow_rates_end_and_name_the_deadline(config, capsys):
    slow = [*APART, "--engine-tokens-per-s", "100", "--response-tokens", "100", "--response-spread", "0"]
    assert main(["plan", config, *slow, "--trainer-tokens-per-s", "0.00001", "--json"]) == 0  # years of virtual time
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["step_s"] == pytest.approx(800 / 0.00002 + 8)
    for options, message in (
        (["--engine-tokens-per-s", "0.1"], "takes 1000 s even alone at 0.1 tokens/s, and rollouts.generation_timeout"),
        (["--engine-tokens-per-s", "1"], "a turn takes about 800 s where the engines are full"),
        (["--response-tokens", "100000"], "a turn is cut at generation.max_new_tokens 512"),
        (["--environment-s", "500"], "rollouts.environment_timeout_s 120 ends every answer before"),
    ):
        assert main(["plan", config, *EXACT, *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_simulation_that_was_stopped_is_no_result(config, monkeypatch, capsys):
    from nemo_rl_core.planning.simulation.parts import SimulatedPolicy

    step = SimulatedPolicy.train_step
    monkeypatch.setattr(
        SimulatedPolicy, "train_step", lambda *args: (signal.raise_signal(signal.SIGINT), step(*args))[1]
    )
    assert main(["plan", config, *EXACT]) == 130
    assert "bound" not in capsys.readouterr().out


def test_mistakes_say_what_to_do(config, tmp_path, capsys):
    assert main(["plan", config]) == 2
    assert "A plan needs --engine-tokens-per-s, --trainer-tokens-per-s, --response-tokens" in capsys.readouterr().err
    assert main(["plan", config, "--rates-from", str(tmp_path)]) == 4
    assert "no metrics of a run that sampled rollouts" in capsys.readouterr().err
    (tmp_path / "sft.yaml").write_text("algorithm: sft\nmodel: scratch:qwen2-1m\ndata: {train: {source: rows.jsonl}}\n")
    assert main(["plan", "sft.yaml", *RATES]) == 2
    assert "is trained on rows and samples nothing" in capsys.readouterr().err
