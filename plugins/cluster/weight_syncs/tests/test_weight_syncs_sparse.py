"""What `delta` sends: the changed bits and nothing else."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.errors import ShapeMismatch
from nemo_rl_plugins_weight_syncs.sparse import apply, difference


def sent(tensor, base):
    """(description, bytes) of a change; `base` is brought up to date."""
    change, pieces = difference("w", tensor, base)
    data = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
    assert data.numel() == change.num_bytes
    return change, data


def test_a_change_by_hand():
    base = torch.zeros(20)
    tensor = base.clone()
    tensor[3], tensor[10] = 1.0, 2.0
    change, data = sent(tensor, base)
    # Element 0 goes along so that no gap is too large: gaps 0, 3, 7 of two bytes, then three float32 values.
    assert change.positions == 3 and change.num_bytes == 3 * 2 + 3 * 4
    assert data[:6].view(torch.uint16).tolist() == [0, 3, 7]
    assert data[6:].clone().view(torch.float32).tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(base, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.03, 0.5, 1.0])
def test_what_arrives_is_the_tensor_bit_for_bit(dtype, share):
    generator = torch.Generator().manual_seed(1)
    old = (torch.randn(700, 300, generator=generator) * 50).to(dtype)
    new = torch.where(torch.rand(old.shape, generator=generator) < share, old + 1, old)
    ours, theirs = old.clone(), old.clone()
    change, data = sent(new, ours)
    found = apply(change, data, theirs)
    assert torch.equal(found, new) and torch.equal(ours, new)
    assert change.num_bytes <= new.nbytes
    if share == 0.0:
        assert change.num_bytes == 0
    if share == 0.03 and dtype == torch.bfloat16:
        assert new.nbytes / change.num_bytes > 10


def test_bits_are_compared_and_not_values():
    base = torch.tensor([0.0, float("nan"), 1.0] * 20)
    same, _ = sent(base.clone(), base.clone())
    assert same.num_bytes == 0  # a nan that stays is no change
    negative_zero = base.clone()
    negative_zero[0] = -0.0
    change, data = sent(negative_zero, base.clone())
    assert torch.signbit(apply(change, data, base.clone())[0])


def test_gaps_larger_than_sixteen_bits():
    base = torch.zeros(300_000)
    tensor = base.clone()
    tensor[-1] = 7.0
    change, data = sent(tensor, base.clone())
    assert torch.equal(apply(change, data, base), tensor)
    assert change.num_bytes < 100


def test_scalars_and_empty_tensors():
    for tensor in (torch.tensor(3.0), torch.empty(0, 4)):
        change, data = sent(tensor, None)
        assert torch.equal(apply(change, data, None), tensor)


def test_a_change_of_another_base_is_refused():
    change, data = sent(torch.ones(8).index_fill(0, torch.tensor([2]), 5.0), torch.ones(8))
    with pytest.raises(ShapeMismatch, match="base of None"):
        apply(change, data, None)
    with pytest.raises(ShapeMismatch, match=r"\(9,\)"):
        apply(change, data, torch.ones(9))
