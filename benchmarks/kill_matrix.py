"""What becomes of a Ray run of 20 GRPO steps when a process of it is killed: each kind, at each stage of a step.

A process is killed with SIGKILL from inside the stage: while completions are under way (generate), between forward and
backward pass (train), in the middle of the weights' arrival (refit), between a checkpoint's files and its name (save).
The run goes on by itself, or stops and is started again by the same call. Either way it is held against a run that
nothing happened to: the same prompts, the same sampled tokens, the same losses and weights, each step once.

    python benchmarks/kill_matrix.py                 # all, about ten minutes; writes the results and the table
    python benchmarks/kill_matrix.py --table         # only the table in the docs, from the results
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cloudpickle

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "kill_matrix.json"
PAGE = HERE.parent / "docs" / "guides" / "fault-tolerance.md"
MARKS = ("<!-- kill matrix: begin -->\n", "<!-- kill matrix: end -->\n")
NUM_STEPS = 20
SAVE_EVERY = 3
STAGES = ("generate", "train", "refit", "save")
KINDS = ("engine", "reward", "trainer", "driver")
NAMES = {
    "engine": "generation engine",
    "reward": "reward process (environment worker)",
    "trainer": "trainer worker",
    "driver": "driver (the command itself)",
}
Kill = tuple[int, str, str]
"""Step (from 1), stage, kind."""

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors and reward processes cannot import it


# -- killing -----------------------------------------------------------------------------------------------


def register(folder: str, kind: str) -> None:
    """This process is one of `kind`."""
    pids = Path(folder, "pids", kind)
    pids.mkdir(parents=True, exist_ok=True)
    (pids / str(os.getpid())).write_text(born("self"), encoding="ascii")


def born(pid: object) -> str:
    """When a process started, in clock ticks; empty if there is none. A number alone may come to be another's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def trip(folder: str, stage: str, kinds: Sequence[str]) -> None:
    """At a stage: kill what was armed for it. Any process may be the one that gets there first."""
    for kind in kinds:
        armed = Path(folder, "armed", f"{stage}-{kind}")
        try:
            armed.rename(Path(folder, "fired", armed.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        mine = False
        for entry in Path(folder, "pids", kind).iterdir():
            alive = born(entry.name) == entry.read_text(encoding="ascii")
            entry.unlink()
            if int(entry.name) == os.getpid():
                mine = True
            elif alive:
                os.kill(int(entry.name), signal.SIGKILL)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)


class Arm:
    """Callback: at the start of a step, arms what is to be killed in it, once."""

    critical = True

    def __init__(self, folder: str, kills: Sequence[Kill]) -> None:
        self.folder, self.kills = folder, kills

    def on_step_start(self, run: Any) -> None:
        """Arm the kills of this step."""
        for step, stage, kind in self.kills:
            name = f"{step}-{stage}-{kind}"
            if step == run.step + 1 and not Path(self.folder, "fired", name).exists():
                Path(self.folder, "armed", f"{stage}-{kind}").write_text(name, encoding="utf-8")


def make_reward(folder: str) -> Callable[..., float]:
    """A reward that varies, and where a reward process can die in the middle of its work."""

    def reward(response: str) -> float:
        register(folder, "reward")
        trip(folder, "generate", ["reward"])
        return sum(response.encode()) % 7 / 6

    return reward


def make_components(folder: str) -> tuple[Any, Any]:
    """The default engine and training backend, with the stages marked."""
    from nemo_rl_core.registry import get_registry

    registry = get_registry()
    engine_class: Any = registry.resolve("generation_backends", "torch_engine").load()
    backend_class: Any = registry.resolve("training_backends", "dtensor").load()
    others = [kind for kind in KINDS if kind != "reward"]

    class Engine(engine_class):  # type: ignore[misc]
        def setup(self, config: Any, context: Any) -> None:
            super().setup(config, context)
            register(folder, "engine")

        async def generate(self, request: Any) -> Any:
            completion = await super().generate(request)
            trip(folder, "generate", others)  # the first that is done: the others are under way
            return completion

        def update_weights(self, number: int, tensors: Any, *, share: bool = False) -> None:
            def arriving() -> Any:
                for index, item in enumerate(tensors):
                    if index == 1:
                        trip(folder, "refit", KINDS)
                    yield item

            super().update_weights(number, arriving(), share=share)

    class Marked:
        def __init__(self, loss: Any) -> None:
            self.loss = loss

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["loss"], name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = self.loss(*args, **kwargs)
            trip(folder, "train", KINDS)
            return found

    class Backend(backend_class):  # type: ignore[misc]
        def setup(self, config: Any, context: Any) -> None:
            super().setup(config, context)
            register(folder, "trainer")

        def train_step(self, batch: Any, loss_fn: Any, plan: Any) -> Any:
            return super().train_step(batch, Marked(loss_fn), plan)

        def save_checkpoint(self, path: Any) -> None:
            super().save_checkpoint(path)
            trip(folder, "save", KINDS)

    return Engine, Backend


# -- runs --------------------------------------------------------------------------------------------------


def attempt(folder: str, kills: Sequence[Kill], cluster: Mapping[str, Any]) -> Any:
    """Start the run, or go on with it; its result."""
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.training.run import run
    from nemo_rl_core.training.setup.parts import RunInputs

    for name in ("armed", "fired", "pids"):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    register(folder, "driver")
    engine, backend = make_components(folder)
    config = {
        "algorithm": "grpo",
        "model": "scratch:qwen2-tiny",
        "learning_rate": 1e-3,
        "num_prompts_per_step": 2,
        "num_generations_per_prompt": 4,
        "max_steps": NUM_STEPS,
        "run_dir": str(Path(folder, "run")),
        "policy": {"max_sequence_length": 32, "backend": backend},
        "generation": {"max_new_tokens": 8, "backend": engine, "max_restarts": 8},
        "logging": {"progress": "none"},
        "checkpointing": {"every": SAVE_EVERY},
        "cluster": {"device": "cpu", "cpus_per_node": 2, **cluster},
    }
    rows = [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(8)]  # each once
    inputs = RunInputs(train_rows=rows, reward=make_reward(folder))
    return run(finalize(load_config(config)), inputs, [Arm(folder, kills)])


def campaign(folder: str, kills: Sequence[Kill], cluster: Mapping[str, Any]) -> list[str]:
    """Attempts until the run is complete; why each of those before the last ended."""
    from nemo_rl_core.errors import NemoRLError

    stops: list[str] = []
    while True:
        try:
            attempt(folder, kills, cluster)
            return stops
        except NemoRLError as error:
            stops.append(f"{type(error).__name__}: {error}".splitlines()[0])
            if len(stops) > len(kills):
                raise


def campaign_elsewhere(folder: str, kills: Sequence[Kill], cluster: Mapping[str, Any]) -> list[str]:
    """As `campaign`, each attempt in a process of its own, which may die."""
    stops: list[str] = []
    command = [sys.executable, __file__, "--attempt", folder, json.dumps(kills), json.dumps(cluster)]
    while (status := subprocess.run(command, check=False, timeout=600).returncode) != 0:
        stops.append(f"its process ended with {status}")
        if len(stops) > len(kills):
            raise RuntimeError(f"{folder}: {stops}")
    return stops


def fired(folder: str) -> set[str]:
    """What was killed, as `step-stage-kind`."""
    return {path.name for path in Path(folder, "fired").iterdir()}


def story(folder: str) -> dict[str, Any]:
    """What a run did: metrics and prompts and sampled tokens of each step, and the weights at the end."""
    from safetensors.torch import load_file

    from nemo_rl_core.records.jsonl import read_groups
    from nemo_rl_core.training.reporting.record import read_metrics

    run_dir = Path(folder, "run")
    metrics = read_metrics(run_dir)
    steps = [int(entry["step"]) for entry in metrics]
    groups = {step: read_groups(run_dir / "rollouts" / f"step_{step}.jsonl") for step in steps}
    return {
        "steps": steps,
        "metrics": [[entry[name] for name in ("train/loss", "train/grad_norm", "reward/mean")] for entry in metrics],
        "prompts": [[group.rollouts[0].task["prompt"] for group in groups[step]] for step in steps],
        "rollouts": [[(r.seed, r.response, r.reward) for g in groups[step] for r in g.rollouts] for step in steps],
        "weights": load_file(run_dir / "model" / "model.safetensors"),
    }


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """In what two runs differ; losses and weights may by 1e-5, since what is sampled again is batched otherwise."""
    import torch

    told = [name for name in ("steps", "prompts", "rollouts") if found[name] != expected[name]]
    pairs = [(torch.tensor(found["metrics"]), torch.tensor(expected["metrics"]), "metrics")]
    pairs += [(found["weights"][name], tensor, name) for name, tensor in expected["weights"].items()]
    for mine, other, name in pairs:
        if mine.shape != other.shape or not torch.allclose(mine, other, rtol=1e-5, atol=1e-5):
            told.append(name)
    return told


# -- the matrix --------------------------------------------------------------------------------------------


def measure(
    work: str, cluster: Mapping[str, Any], known: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Mapping[str, Any]]:
    """A run for each kind and stage, but for those in `known`."""
    attempt(f"{work}/undisturbed", [], {"launcher": "local"})  # Ray takes the same steps
    expected = story(f"{work}/undisturbed")
    prompts = [prompt for step in expected["prompts"] for prompt in step]
    if expected["steps"] != list(range(1, NUM_STEPS + 1)) or len(set(prompts)) != len(prompts):
        raise RuntimeError(f"The undisturbed run is not what it should be: {expected['steps']}, {prompts}")
    done = {(row["kind"], row["stage"]): row for row in known}
    for kind in KINDS:
        for stage in STAGES:
            if (kind, stage) in done:
                yield done[kind, stage]
                continue
            kill: Kill = (2 * SAVE_EVERY if stage == "save" else 2 * SAVE_EVERY + 2, stage, kind)
            folder = f"{work}/{kind}-{stage}"
            started = time.monotonic()
            stops = (campaign_elsewhere if kind == "driver" else campaign)(folder, [kill], cluster)
            yield {
                "kind": kind,
                "stage": stage,
                "step": kill[0],
                "killed": fired(folder) == {"-".join(map(str, kill))},
                "stopped_with": stops,
                "differences": differences(story(folder), expected),
                "seconds": round(time.monotonic() - started, 1),
            }


@contextlib.contextmanager
def cluster_at(address: str | None) -> Iterator[str]:
    """The Ray cluster there, or one for this benchmark."""
    if address is not None:
        yield address
        return
    from ray.cluster_utils import Cluster

    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0, "include_dashboard": False})
    try:
        yield head.address
    finally:
        head.shutdown()


def outcome(row: Mapping[str, Any]) -> str:
    """One cell of the table."""
    if not row["killed"]:
        return "not killed"
    end = "nothing lost" if not row["differences"] else "differs in " + ", ".join(row["differences"])
    replaced = {"engine": "restarted and refitted", "reward": "replaced, its call made again"}
    if not row["stopped_with"]:
        return f"{replaced.get(row['kind'], 'the run goes on')}; {end}"
    if row["kind"] == "driver":
        return f"the workers end with it; resumed, {end}"
    return f"the run stops with {row['stopped_with'][0].partition(':')[0]}; resumed, {end}"


def table(report: Mapping[str, Any]) -> str:
    """The outcomes as Markdown."""
    cells = {(row["kind"], row["stage"]): outcome(row) for row in report["results"]}
    lines = [f"| killed | {' | '.join(f'in {stage}' for stage in STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    lines += [
        f"| {NAMES[kind]} | {' | '.join(cells.get((kind, stage), 'not tried yet') for stage in STAGES)} |"
        for kind in KINDS
    ]
    return "\n".join(lines) + "\n"


def with_table(page: str, report: Mapping[str, Any]) -> str:
    """The page with this table between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table(report)}\n{MARKS[1]}{after}"


def main() -> None:
    """Run the matrix, one attempt, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the results that are there")
    parser.add_argument("--address", help="of a Ray cluster of at least two cores; none starts one")
    parser.add_argument("--go-on", action="store_true", help="keep the rows of the results that are there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--attempt", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attempt:
        folder, kills, cluster = options.attempt
        attempt(folder, [tuple(kill) for kill in json.loads(kills)], json.loads(cluster))
        return
    if not options.table:
        known = json.loads(options.results.read_text(encoding="utf-8"))["results"] if options.go_on else []
        report: dict[str, Any] = {
            "benchmark": "kill_matrix",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"python": platform.python_version(), "system": platform.system(), "cpus": os.cpu_count()},
            "versions": {name: version(name) for name in ("torch", "ray", "nemo-rl-core", "nemo-rl-ray")},
            "steps": NUM_STEPS,
            "results": [],
        }
        with tempfile.TemporaryDirectory() as work, cluster_at(options.address) as address:
            for row in measure(work, {"launcher": "ray", "options": {"address": address}}, known):
                report["results"].append(row)
                options.results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, json.loads(options.results.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
