"""The contract of an exporter against exporters broken on purpose, one at least for each clause."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.protocols.exporter import ExportReport
from nemo_rl_core.testing import ExporterContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses

torch.set_num_threads(1)


class Sound:
    """Writes all weights into one file, with the configuration beside it."""

    config_class = dict

    def __init__(self, config=None):
        self.config = config

    def export(self, model_dir, target):
        target = Path(target)
        config, tensors = self.read(model_dir)
        beside = target.with_name(target.name + ".part")
        try:
            self.write(beside, config, tensors)
            self.publish(beside, target)
        except OSError as error:
            raise CheckpointError(f"Cannot write the export {target}: {error}. Choose another target.") from error
        finally:
            self.clean(beside)
        return self.report(target)

    def read(self, model_dir):
        try:
            config = json.loads((model_dir / "config.json").read_text())
            tensors = load_file(model_dir / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{model_dir} is not a whole model: {error}. Export it again.") from error
        self.check(model_dir, tensors)
        return config, tensors

    def check(self, model_dir, tensors):
        index = model_dir / "model.safetensors.index.json"
        if index.exists():
            lost = set(json.loads(index.read_text())["weight_map"]) - set(tensors)
            if lost:
                raise CheckpointError(f"{model_dir} lacks {', '.join(sorted(lost))}. Export it again.")

    def write(self, folder, config, tensors):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "weights.safetensors")

    def publish(self, beside, target):
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)

    def clean(self, beside):
        shutil.rmtree(beside, ignore_errors=True)

    def report(self, target):
        files = {p.name: p.stat().st_size for p in target.iterdir()}
        return ExportReport(location=str(target), files=tuple(sorted(files)), num_bytes=sum(files.values()))


class Kit(ExporterContract):
    def read_weights(self, location):
        return load_file(Path(location) / "weights.safetensors")


class ReturnsAPath(Sound):
    def report(self, target):
        return target


class ReportsTooLittle(Sound):
    def report(self, target):
        return ExportReport(location=str(target), files=("weights.safetensors",), num_bytes=0)


class LosesATensor(Sound):
    def read(self, model_dir):
        config, tensors = super().read(model_dir)
        tensors.pop(max(tensors))
        return config, tensors


class Transposes(Sound):
    def read(self, model_dir):
        config, tensors = super().read(model_dir)
        return config, {name: value.t().contiguous() if value.ndim == 2 else value for name, value in tensors.items()}


class WritesIntoTheSource(Sound):
    def read(self, model_dir):
        config, tensors = super().read(model_dir)
        (model_dir / "exported.json").write_text("{}")
        return config, tensors


class EditsTheSource(Sound):
    def read(self, model_dir):
        config, tensors = super().read(model_dir)
        (model_dir / "config.json").write_text(json.dumps({**config, "exported": True}))
        return config, tensors


class StampsTheTime(Sound):
    def write(self, folder, config, tensors):
        super().write(folder, {**config, "exported_at": time.time_ns()}, tensors)


class NumbersItsExports(Sound):
    def export(self, model_dir, target):
        number = len(list(Path(target).parent.glob(Path(target).name + "*")))
        return super().export(model_dir, f"{target}-{number}")


class KeepsWhatIsThere(Sound):
    def publish(self, beside, target):
        if not target.exists():
            beside.rename(target)


class NeedsTheParent(Sound):
    def write(self, folder, config, tensors):
        if not folder.parent.is_dir():
            raise CheckpointError(f"{folder.parent} is no folder.")
        super().write(folder, config, tensors)


class RaisesWhatItMeets(Sound):
    def read(self, model_dir):
        config = json.loads((model_dir / "config.json").read_text())
        tensors = load_file(model_dir / "model.safetensors")
        self.check(model_dir, tensors)
        return config, tensors


class DoesNotReadTheIndex(Sound):
    def check(self, model_dir, tensors):
        pass


class SaysNothing(Sound):
    def read(self, model_dir):
        try:
            return super().read(model_dir)
        except CheckpointError:
            raise CheckpointError("The export failed.") from None


class TakesAnEmptySource(Sound):
    def read(self, model_dir):
        return super().read(model_dir) if model_dir.is_dir() else ({}, {})


class WritesInPlace(Sound):
    """The configuration is there before the weights are read."""

    def export(self, model_dir, target):
        target = Path(target)
        if (model_dir / "config.json").is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(model_dir / "config.json", target)
        return super().export(model_dir, target)


class LeavesItsPart(Sound):
    def read(self, model_dir):
        self.source = model_dir
        return super().read(model_dir)

    def export(self, model_dir, target):
        beside = Path(target).with_name(Path(target).name + ".tmp")
        beside.mkdir(parents=True, exist_ok=True)
        (beside / "lock").write_text("")
        report = super().export(model_dir, target)
        shutil.rmtree(beside)
        return report


class RemovesTheOlderOneFirst(Sound):
    def export(self, model_dir, target):
        shutil.rmtree(target, ignore_errors=True)
        return super().export(model_dir, target)


class RaisesOSError(Sound):
    def export(self, model_dir, target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        return super().export(model_dir, target)


BROKEN = {
    "reports_what_it_made": [ReturnsAPath, ReportsTooLittle],
    "weights_survive": [LosesATensor, Transposes],
    "source_is_left_alone": [WritesIntoTheSource, EditsTheSource],
    "again_gives_the_same": [StampsTheTime, NumbersItsExports],
    "replaces_an_older_export": [KeepsWhatIsThere],
    "makes_parent_folders": [NeedsTheParent],
    "refuses_a_broken_source": [RaisesWhatItMeets, DoesNotReadTheIndex, SaysNothing],
    "refuses_a_missing_source": [TakesAnEmptySource, RaisesWhatItMeets],
    "whole_or_not_at_all": [WritesInPlace, LeavesItsPart, RemovesTheOlderOneFirst],
    "refuses_a_target_it_cannot_write": [RaisesOSError],
}


def test_a_sound_exporter_passes_every_clause():
    report = run_kit(Kit, Sound)
    assert [result for result in report.results if result.outcome != "passed"] == []


def test_every_clause_has_a_broken_exporter():
    assert set(BROKEN) == set(clauses(ExporterContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_exporter_fails_its_clause(clause, broken):
    report = run_kit(Kit, broken, only=[clause])
    assert report.failed == (clause,), report
