"""An output layer whose rows stand on two ranks gives what one rank with all rows gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_rl_core.models.numerics.logprobs import LogitTransform, VocabularyShard, likeliest, linear_logprobs

M, E, V, CUT = 11, 8, 37, 20  # rows 0 to 19 stand on rank 0


def _inputs():
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(M, E, generator=rng)
    weight = torch.randn(V, E, generator=rng)
    targets = torch.randint(0, V, (M, 3), generator=rng)
    return hidden, weight, targets, torch.randn(M, 3, generator=rng), torch.randn(M, generator=rng)


def _step(hidden, weight, targets, by_token, by_entropy, shard=None, chunk=4):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = linear_logprobs(
        hidden,
        weight,
        targets,
        transform=LogitTransform(temperature=0.7),
        chunk_size=chunk,
        with_entropy=True,
        shard=shard,
    )
    ((logprobs * by_token).sum() + (entropy * by_entropy).sum()).backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    hidden, weight, targets, by_token, by_entropy = _inputs()
    rows = slice(0, CUT) if rank == 0 else slice(CUT, V)
    shard = VocabularyShard(start=rows.start, group=dist.group.WORLD)
    found = {}
    for chunk in (4, 100):
        logprobs, entropy, d_hidden, d_weight = _step(
            hidden, weight[rows], targets, by_token, by_entropy, shard=shard, chunk=chunk
        )
        dist.all_reduce(d_hidden)
        found[chunk] = (logprobs, entropy, d_hidden, d_weight)
    for k in (1, 5, 19):  # 19: more than rank 1 has
        found[f"top{k}"] = likeliest(hidden, weight[rows], k, chunk_size=4, shard=shard)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("chunk", [4, 100])
def test_values_and_gradients_are_those_of_the_whole(of_two_ranks, chunk):
    hidden, weight, targets, by_token, by_entropy = _inputs()
    expected = _step(hidden, weight, targets, by_token, by_entropy)
    for rank, rows in enumerate((slice(0, CUT), slice(CUT, V))):
        *found, d_weight = of_two_ranks[rank][chunk]
        for one, other in zip(found, expected, strict=False):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d_weight, expected[3][rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 19])
def test_the_likeliest_tokens_are_those_of_the_whole(of_two_ranks, k):
    hidden, weight, *_ = _inputs()
    ids, logprobs = likeliest(hidden, weight, k)
    for found_ids, found in (ranks[f"top{k}"] for ranks in of_two_ranks):
        assert torch.equal(found_ids, ids)
        torch.testing.assert_close(found, logprobs, rtol=1e-5, atol=1e-5)
