"""Base class of the contracts whose components are expensive to make, so that the kit sets them up itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_rl_core.testing.conformance.frame.declared import overlaid
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.conformance.frame.subject import Configured, from_reference

if TYPE_CHECKING:
    from nemo_rl_core.registry import ComponentRef

__all__ = ["SetUpContract"]


class SetUpContract(Contract):
    """A contract whose subject is a class, or a `Configured` with its options.

    Attributes:
        config_options: Options of the component, if the defaults do not suit the kit.
    """

    config_options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_component(
        cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]
    ) -> Configured[object]:
        """Return the component with these options, not made yet."""
        return from_reference(cls.kind, ref, overlaid(example, options))

    @classmethod
    def declared_by(cls, subject: object) -> object:
        """Return the class under test."""
        return subject.loaded if isinstance(subject, Configured) else subject
