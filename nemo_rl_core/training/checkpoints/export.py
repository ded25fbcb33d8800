"""Writing the policy as a Hugging Face checkpoint, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_core.errors import CheckpointError

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.training.model.policy import Policy

__all__ = ["export_model"]


def export_model(policy: Policy, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration and tokenizer to `folder`, replacing what is there by a rename.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; what was there is untouched.
    """
    temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    old = folder.with_name(f".old-{folder.name}")
    try:
        temporary.mkdir(parents=True)
        policy.export_model(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"Could not write the model to {folder}: {type(error).__name__}: {error}. The checkpoints of the run are "
            "untouched. Free space on the disk and resume the run to write it again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
