"""Memory that is given back and restored: the tensors, their views and what shares their storage stay."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.backends.host_memory import HostMemory
from nemo_rl_core.errors import InvariantViolation


def test_a_view_and_its_base_are_emptied_together_and_come_back():
    flat = torch.arange(12.0)
    matrix, other = flat[:6].view(2, 3), torch.full((5,), 7, dtype=torch.int64)
    host = HostMemory()
    assert host.offload([matrix, flat, other]) == 12 * 4 + 5 * 8
    assert host.is_away
    assert flat.untyped_storage().nbytes() == matrix.untyped_storage().nbytes() == 0
    assert host.offload([matrix]) == 0  # again nothing
    host.reload()
    host.reload()
    assert not host.is_away
    assert torch.equal(matrix, torch.arange(6.0).view(2, 3))
    flat[0] = 9.0
    assert matrix[0, 0] == 9.0  # still one memory
    assert torch.equal(other, torch.full((5,), 7))


def test_what_changed_between_two_turns_is_kept():
    weight, other = torch.arange(100.0), torch.arange(7, dtype=torch.int16)
    host = HostMemory(slab_bytes=64)  # seven slabs; the other begins within one
    for turn in range(3):
        weight += 1
        host.offload([weight, other])
        host.reload()
        assert torch.equal(weight, torch.arange(100.0) + turn + 1)
        assert torch.equal(other, torch.arange(7, dtype=torch.int16))


def test_what_nobody_needs_comes_back_as_zeros():
    weight, gradient, host = torch.ones(3), torch.ones(3), HostMemory()
    host.offload([weight], zeros=[gradient])
    assert gradient.untyped_storage().nbytes() == 0
    host.reload()
    assert weight.tolist() == [1.0] * 3
    assert gradient.tolist() == [0.0] * 3


def test_constant_tensors_are_copied_once():
    weight, host = torch.ones(3), HostMemory(constant=True)
    host.offload([weight])
    host.reload()
    weight.zero_()
    host.offload([weight])
    host.reload()
    assert weight.tolist() == [1.0] * 3


def test_using_what_is_away_is_refused():
    host = HostMemory()
    host.check_here("The model")
    host.offload([torch.ones(3)])
    with pytest.raises(InvariantViolation, match=r"The model waits in the host's memory.*reload\(\)"):
        host.check_here("The model")
