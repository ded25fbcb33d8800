"""The contract of an exporter.

The source is a real model folder of the smallest built-in model. Exports are compared file by file.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.protocols.exporter import Exporter, ExportReport
from nemo_rl_core.testing.conformance.frame.kit import Contract

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExporterContract"]

_MODEL = "scratch:qwen2-tiny"


def _cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: "model.safetensors" for name in [*tensors, "lost.weight"]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: Mapping[str, Callable[[Path], object]] = {
    "a folder without config.json": lambda folder: (folder / "config.json").unlink(),
    "a config.json that is no JSON": lambda folder: (folder / "config.json").write_text('{"model_type": '),
    "a folder without weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights that were cut short": _cut_short,
    "weights that their index says more of": _without_a_tensor,
}
"""Sources that are not a whole model."""


class ExporterContract(Contract):
    """What every exporter must be. Define the fixture `exporter`.

    Override `target` for one that writes elsewhere than to a folder, `read_weights` if its export can be read.
    """

    kind: ClassVar[str] = "exporters"
    subject: ClassVar[str] = "exporter"

    def target(self, folder: Path) -> str | Path:
        """Return where to export to. Default: `folder / "exported"`, which does not exist."""
        return folder / "exported"

    def read_weights(self, location: str) -> Mapping[str, Tensor] | None:
        """Return the weights [...] of an export by their original names; None if they cannot be read. Default: None."""
        return None

    @pytest.fixture
    def _model_dir(self, tmp_path: Path) -> Path:
        """A copy of a real model folder."""
        folder = tmp_path / "model"
        shutil.copytree(_model_folder(), folder)
        return folder

    # -- clauses -------------------------------------------------------------------------------

    def test_reports_what_it_made(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """It returns an `ExportReport` that is true: the place, the files in it, their bytes."""
        report = exporter.export(_model_dir, self.target(tmp_path))
        assert isinstance(report, ExportReport), f"export returned {type(report).__name__}"
        assert report.location, "the location is empty"
        place = Path(report.location)
        if not place.exists():
            pytest.skip(f"{report.location} is no path of this machine")
        files = _files(place)
        assert list(report.files) == sorted(files), f"it reports the files {report.files}, there are {sorted(files)}"
        size = sum(map(len, files.values()))
        assert report.num_bytes == size, f"it reports {report.num_bytes} bytes, there are {size}"

    def test_weights_survive(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """The export holds the weights of the source: every one, with its shape and numbers."""
        import torch
        from safetensors.torch import load_file

        found = self.read_weights(exporter.export(_model_dir, self.target(tmp_path)).location)
        if found is None:
            pytest.skip("`read_weights` says that they cannot be read")
        expected = load_file(_model_dir / "model.safetensors")
        assert set(found) == set(expected), f"names differ: {sorted(set(found) ^ set(expected))[:4]}"
        for name, value in expected.items():
            same = found[name].shape == value.shape and torch.allclose(found[name].float(), value.float(), atol=1e-2)
            assert same, f"{name} is not what it was"

    def test_source_is_left_alone(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """It changes nothing in the source and adds nothing to it."""
        before = _files(_model_dir)
        exporter.export(_model_dir, self.target(tmp_path))
        after = _files(_model_dir)
        assert sorted(after) == sorted(before), f"files of the source differ: {sorted(set(after) ^ set(before))}"
        changed = [name for name in before if after[name] != before[name]]
        assert not changed, f"it changed {changed[0]} of the source"

    def test_again_gives_the_same(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """Exported again to the same place, the same is there: nothing older, nothing twice."""
        target = self.target(tmp_path)
        first = exporter.export(_model_dir, target)
        before = _files(Path(first.location))
        second = exporter.export(_model_dir, target)
        after = _files(Path(second.location))
        assert second.location == first.location, f"first it was at {first.location}, then at {second.location}"
        assert sorted(after) == sorted(before), f"the second time other files are there: {set(after) ^ set(before)}"
        changed = [name for name in before if after[name] != before[name]]
        assert not changed, f"{changed[0]} is different the second time"

    def test_replaces_an_older_export(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """An export of other weights to the same place replaces the older one wholly."""
        target = self.target(tmp_path)
        exporter.export(_model_dir, target)
        _double(_model_dir)
        found = _files(Path(exporter.export(_model_dir, target).location))
        fresh = _files(Path(exporter.export(_model_dir, self.target(_made(tmp_path / "fresh"))).location))
        different = sorted(name for name in {*found, *fresh} if found.get(name) != fresh.get(name))
        assert not different, f"after the second export {different[0]} is that of the first"

    def test_makes_parent_folders(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """Folders above the target that are missing are made."""
        target = self.target(tmp_path / "not" / "there" / "yet")
        try:
            exporter.export(_model_dir, target)
        except Exception as error:
            raise AssertionError(f"to {target} it raised {type(error).__name__}: {error}") from error

    @pytest.mark.parametrize("what", list(BROKEN))
    def test_refuses_a_broken_source(self, exporter: Exporter, _model_dir: Path, tmp_path: Path, what: str) -> None:
        """A source that is not a whole model is refused by a `NemoRLError` that names the folder or the file."""
        BROKEN[what](_model_dir)
        self._refused(exporter, _model_dir, self.target(tmp_path), what)

    def test_refuses_a_missing_source(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """A source that does not exist, or is a file, is refused by a `NemoRLError` that names it."""
        for source in (tmp_path / "no-such-model", _model_dir / "config.json"):
            self._refused(exporter, source, self.target(tmp_path), f"the source {source.name}")

    def test_whole_or_not_at_all(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """An export that fails leaves nothing behind, and an older export as it was."""
        sound = _made(tmp_path / "sound") / "model"
        shutil.copytree(_model_dir, sound)
        for what, break_it in BROKEN.items():
            area = _made(tmp_path / f"area-{len(what)}")
            broken = _made(tmp_path / f"broken-{len(what)}") / "model"
            shutil.copytree(_model_dir, broken)
            break_it(broken)
            self._refused(exporter, broken, self.target(area), what)
            left = sorted(_files(area))
            assert not left, f"{what}: it left {left[0]} behind"
            exporter.export(sound, self.target(area))
            before = _files(area)
            self._refused(exporter, broken, self.target(area), what)
            after = _files(area)
            different = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            assert not different, f"{what}: it changed {different[0]} of an older export"

    def test_refuses_a_target_it_cannot_write(self, exporter: Exporter, _model_dir: Path, tmp_path: Path) -> None:
        """A target that cannot be written is refused by a `NemoRLError` that names it."""
        blocked = tmp_path / "a-file"
        blocked.write_text("not a folder")
        target = self.target(blocked)
        if str(blocked) not in str(target):
            pytest.skip("its targets are not paths below a folder")
        self._refused(exporter, _model_dir, target, "a target below a file", names=("a-file",))

    # -- exporting -------------------------------------------------------------------------------

    def _refused(
        self, exporter: Exporter, source: Path, target: str | Path, what: str, names: tuple[str, ...] = ()
    ) -> None:
        try:
            exporter.export(source, target)
        except NemoRLError as error:
            wanted = names or (str(source), source.name)
            assert any(name in str(error) for name in wanted), f"the error for {what} names no file: {error}"
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__} ({error}), not a NemoRLError") from error
        else:
            raise AssertionError(f"{what} was exported")


@functools.cache
def _model_folder() -> Path:
    """The smallest model with its tokenizer, saved once for this process."""
    import torch

    from nemo_rl_core.models import load_model, load_tokenizer

    kept = tempfile.TemporaryDirectory(prefix="nemo-rl-kit-")
    _kept.append(kept)
    folder = Path(kept.name)
    load_model(_MODEL, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(_MODEL).save_pretrained(folder)
    return folder


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


def _double(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: value * 2 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _files(place: Path) -> dict[str, bytes]:
    """Every file at or below a place, by relative path."""
    if place.is_file():
        return {place.name: place.read_bytes()}
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}
