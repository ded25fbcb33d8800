"""What we add to vLLM's workers: methods that `collective_rpc` calls by name."""

from __future__ import annotations

from typing import Any

__all__ = ["WorkerExtension"]


class WorkerExtension:
    """Mixed into vLLM's worker class; the prefix keeps the names apart from its own."""

    weight_transfer_engine: Any
    model_runner: Any
    vllm_config: Any

    def nemo_rl_fingerprint(self) -> str | None:
        """Digest of the weights that the last update brought to this worker."""
        digest: str | None = self.weight_transfer_engine.fingerprint()
        return digest

    def nemo_rl_abandon_update(self) -> None:
        """Leave a broken weight update, so that the next one starts anew."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.abandon()
        self._weight_update_active = False

    def nemo_rl_prepare_pipeline(self) -> None:
        """Before the first step of a pipeline."""
        from nemo_rl_plugins_vllm.cpu import prepare_pipeline

        prepare_pipeline(self.model_runner)

    def nemo_rl_release_cache(self) -> int:
        """Without a GPU: give the memory of the KV cache back. Returns its bytes."""
        from nemo_rl_plugins_vllm.cpu import release_cache

        return release_cache(self.model_runner)

    def nemo_rl_restore_cache(self) -> None:
        """Undo `nemo_rl_release_cache`; the cache is empty then."""
        from nemo_rl_plugins_vllm.cpu import restore_cache

        restore_cache(self.model_runner)
