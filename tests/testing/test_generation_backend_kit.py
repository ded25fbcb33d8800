"""The kit of generation backends, tried on engines that are broken in one thing each."""

from __future__ import annotations

import asyncio
import threading
import zlib

import pytest
import torch
from attrs import evolve

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.testing import GenerationBackendContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses
from nemo_rl_plugins_torch_engine.backend import TorchEngine


class Impatient(GenerationBackendContract):
    wait_s = 3.0  # for engines that never answer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def asking(**changes):
    """An engine that takes every request for another: `field=function(sampling)`."""

    class Engine(TorchEngine):
        async def generate(self, request):
            made = {name: change(request.sampling) for name, change in changes.items()}
            return await super().generate(evolve(request, sampling=evolve(request.sampling, **made)))

    return Engine


def answering(change):
    """An engine whose completions are changed by `change(request, completion)`."""

    class Engine(TorchEngine):
        async def generate(self, request):
            return change(request, await super().generate(request))

    return Engine


def shortened(completion):
    return evolve(completion, token_ids=completion.token_ids[:-1], logprobs=completion.logprobs[:-1])


class Teleporting(TorchEngine):
    capabilities = TorchEngine.capabilities | {"teleport"}


class WithoutConfigClass(TorchEngine):
    config_class = dict


class OneAtATime(TorchEngine):
    """Serves a request when the one before it is through."""

    async def generate(self, request):
        if not hasattr(self, "free"):
            self.free = asyncio.Lock()
        async with self.free:
            return await super().generate(request)


class SeedOfTheName(TorchEngine):
    """Ignores the seed: draws by the name of the request, which another run gives otherwise."""

    async def generate(self, request):
        own = zlib.crc32(request.request_id.encode())
        return await super().generate(evolve(request, sampling=evolve(request.sampling, seed=own)))


def without_the_last_logprob(request, found):
    """The token that ends a completion is taken for given."""
    return evolve(found, logprobs=[*found.logprobs[:-1], 0.0]) if found.finish_reason == "stop" else found


class MixedUp(TorchEngine):
    """Two requests at a time get each other's completions."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    async def generate(self, request):
        found = await super().generate(request)
        self.waiting.append(found.request_id)
        return evolve(found, request_id=self.waiting[-2] if len(self.waiting) > 1 else found.request_id)


class SeedOfTheBatch(TorchEngine):
    """Draws from one stream of random numbers for all requests, as most engines did."""

    num_requests = 0

    async def generate(self, request):
        type(self).num_requests += 1
        sampling = evolve(request.sampling, seed=type(self).num_requests)
        return await super().generate(evolve(request, sampling=sampling))


class SeedOfTheEngine(TorchEngine):
    """Mixes its own seed into the request's."""

    def setup(self, config, context):
        super().setup(config, context)
        self.own = context.seed

    async def generate(self, request):
        sampling = request.sampling
        if sampling.seed is not None:
            sampling = evolve(sampling, seed=sampling.seed + 1000 * self.own)
        return await super().generate(evolve(request, sampling=sampling))


class Leaking(TorchEngine):
    """Has 64 places, and a cancelled call keeps its own."""

    def __init__(self):
        super().__init__()
        self.free = 64
        self.waiting = []

    async def generate(self, request):
        while self.free == 0:
            await asyncio.sleep(0.01)
        self.free -= 1
        found = await super().generate(request)
        self.free += 1
        return found


class ForgetsDuringPause(TorchEngine):
    paused = False

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    async def generate(self, request):
        if self.paused:
            await asyncio.sleep(3600)
        return await super().generate(request)


class DoesNotPause(TorchEngine):
    def pause(self):
        pass

    def resume(self):
        pass


class AnswersNothing(TorchEngine):
    async def generate(self, request):
        if not request.prompt_ids:
            return Completion(request_id=request.request_id, token_ids=[], logprobs=[], finish_reason="stop")
        return await super().generate(request)


class WrongError(TorchEngine):
    async def generate(self, request):
        try:
            return await super().generate(request)
        except GenerationError as error:
            raise ValueError(str(error)) from None


class CutsThePrompt(TorchEngine):
    async def generate(self, request):
        return await super().generate(evolve(request, prompt_ids=request.prompt_ids[: self._max_length - 1]))


class Refitting(TorchEngine):
    """Base of engines that are broken in a refit: `put(version, tensors, share)`."""

    def put(self, version, tensors, share):
        super().update_weights(version, tensors, share=share)

    def update_weights(self, version, tensors, *, share=False):
        self.put(version, tensors, share)


class KeepsItsVersion(Refitting):
    def put(self, version, tensors, share):
        super().put(0, tensors, share)


class KeepsItsWeights(Refitting):
    def put(self, version, tensors, share):
        list(tensors)
        self._scheduler.weights_changed(version)


class KeepsItsFingerprint(TorchEngine):
    def setup(self, config, context):
        super().setup(config, context)
        self.kept = super().fingerprint()

    def fingerprint(self):
        return self.kept


class Remembers(TorchEngine):
    """A cache of whole answers, by prompt and seed, that a refit does not clear."""

    def __init__(self):
        super().__init__()
        self.answers = {}

    async def generate(self, request):
        key = (tuple(request.prompt_ids), request.sampling)
        if key not in self.answers:
            self.answers[key] = await super().generate(request)
        return evolve(self.answers[key], request_id=request.request_id)


class AlwaysShares(Refitting):
    def put(self, version, tensors, share):
        super().put(version, tensors, True)


class Gathers(Refitting):
    """Takes all tensors, then copies them."""

    def put(self, version, tensors, share):
        super().put(version, iter(list(tensors)), share)


class IgnoresShared(Refitting):
    def put(self, version, tensors, share):
        if not share:
            super().put(version, tensors, share)


class Scribbles(Refitting):
    def put(self, version, tensors, share):
        given = list(tensors)
        super().put(version, ((name, tensor.clone()) for name, tensor in given), share)
        if share:
            given[0][1].zero_()


class Lenient(Refitting):
    """Takes what fits and leaves the rest."""

    def put(self, version, tensors, share):
        own = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        own |= {name: t for name, t in tensors if name in own and own[name].shape == t.shape}
        super().put(version, iter(own.items()), share)


class HalfLoaded(Refitting):
    """Refuses, but samples from what was loaded before the wrong tensor."""

    def put(self, version, tensors, share):
        try:
            super().put(version, tensors, share)
        finally:
            self._broken_weights = None


class BadSleeper(TorchEngine):
    def sleep(self):
        super().sleep()
        self._model.requires_grad_(False)
        for parameter in self._model.parameters():
            parameter.data = torch.zeros_like(parameter)
        self._scheduler.decoder.refresh()


class ForgetsItsVersionAsleep(TorchEngine):
    def wake(self):
        self._scheduler.version = 0


class WakesWithTheOldWeights(TorchEngine):
    def sleep(self):
        self.kept = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        super().sleep()

    def wake(self):
        super().wake()
        for name, parameter in self._model.named_parameters():
            parameter.detach().copy_(self.kept[name])
        self._scheduler.decoder.refresh()


class NotANumber(TorchEngine):
    def metrics(self):
        return {"fill": float("nan")}


class LeavesAThread(TorchEngine):
    """Its thread runs on until the end of the test that made it."""

    released = threading.Event()

    def setup(self, config, context):
        super().setup(config, context)
        threading.Thread(target=self.released.wait, name="forgotten", daemon=True).start()


class ShutsDownOnce(TorchEngine):
    gone = 0

    def shutdown(self):
        super().shutdown()
        self.gone += 1
        if self.gone == 2:
            raise RuntimeError("was shut down already")


def over_the_limit(request, found):
    if found.finish_reason != "length" or len(request.prompt_ids) + len(found.token_ids) > 30:
        return found
    return evolve(found, token_ids=[*found.token_ids, 5], logprobs=[*found.logprobs, -1.0])


BROKEN = {
    "declares_itself": (Teleporting, WithoutConfigClass),
    "logprobs": (
        answering(lambda r, c: evolve(c, logprobs=[x / r.sampling.temperature for x in c.logprobs])),
        asking(temperature=lambda s: 1.0),
        answering(lambda r, c: evolve(c, logprobs=c.logprobs[:-1])),
    ),
    "greedy": (
        answering(lambda r, c: evolve(c, logprobs=[0.0] * len(c.logprobs))),
        asking(temperature=lambda s: 0.5, seed=lambda s: 1),
    ),
    "top_p_and_top_k": (
        asking(top_k=lambda s: 0),
        asking(top_p=lambda s: 1.0),
        answering(lambda r, c: evolve(c, logprobs=[x - 0.3 for x in c.logprobs])),
    ),
    "sampling_follows_the_distribution": (
        asking(temperature=lambda s: 1.0),
        asking(top_p=lambda s: 0.9),
        asking(seed=lambda s: s.seed % 50),
    ),
    "length": (
        answering(over_the_limit),
        asking(max_new_tokens=lambda s: max(1, s.max_new_tokens - 1)),
        answering(lambda r, c: evolve(c, finish_reason="stop")),
    ),
    "context_ends": (answering(lambda r, c: shortened(c)), answering(lambda r, c: evolve(c, finish_reason="stop"))),
    "stop_token": (
        asking(stop_token_ids=lambda s: ()),
        answering(lambda r, c: shortened(c) if c.finish_reason == "stop" else c),
        answering(lambda r, c: evolve(c, stop_reason=None)),
        answering(lambda r, c: evolve(c, finish_reason="length")),
        answering(without_the_last_logprob),
    ),
    "end_of_sequence": (
        asking(ignore_eos=lambda s: False),
        asking(ignore_eos=lambda s: True),
        answering(lambda r, c: shortened(c) if c.finish_reason == "stop" else c),
        answering(lambda r, c: evolve(c, finish_reason="length")),
        answering(without_the_last_logprob),
    ),
    "stop_string": (
        asking(stop=lambda s: ()),
        answering(lambda r, c: shortened(c) if c.finish_reason == "stop" else c),
        answering(lambda r, c: evolve(c, stop_reason=c.token_ids[-1])),
        answering(without_the_last_logprob),
    ),
    "many_at_a_time": (MixedUp, asking(max_new_tokens=lambda s: 4)),
    "serves_at_the_same_time": (OneAtATime,),
    "seed": (SeedOfTheBatch, SeedOfTheEngine, SeedOfTheName),
    "seeds_differ": (asking(seed=lambda s: 0),),
    "samples_differ": (asking(seed=lambda s: s.seed or 0),),
    "cancelling": (Leaking,),
    "pause_and_resume": (ForgetsDuringPause, DoesNotPause),
    "empty_prompt": (AnswersNothing, WrongError),
    "prompt_too_long": (CutsThePrompt, WrongError),
    "refit": (KeepsItsVersion, KeepsItsWeights),
    "fingerprint": (KeepsItsFingerprint, KeepsItsWeights),
    "caches_are_fresh_after_a_refit": (Remembers,),
    "copies_unless_shared": (AlwaysShares,),
    "copies_each_before_the_next": (Gathers,),
    "shared_weights": (IgnoresShared, Scribbles),
    "wrong_weights": (Lenient, HalfLoaded),
    "in_flight_update": (answering(lambda r, c: evolve(c, last_weight_version=c.weight_version)),),
    "sleep_and_wake": (BadSleeper, ForgetsItsVersionAsleep),
    "update_asleep": (WakesWithTheOldWeights,),
    "metrics": (NotANumber,),
    "shutdown": (LeavesAThread, ShutsDownOnce),
}


def test_a_broken_engine_is_there_for_each_clause():
    assert set(BROKEN) == set(clauses(GenerationBackendContract))


def test_a_sound_engine_passes():
    report = run_kit(GenerationBackendContract, lambda: TorchEngine)
    assert report.passed, {r.clause: r.message for r in report.results if r.outcome != "passed"}
    assert {r.outcome for r in report.results} == {"passed"}


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, engines in BROKEN.items() for b in engines])
def test_a_broken_engine_is_caught(clause, broken):
    LeavesAThread.released.clear()
    try:
        contract = Impatient if broken in (Leaking, ForgetsDuringPause) else GenerationBackendContract
        report = run_kit(contract, lambda: broken, only=[clause])
    finally:
        LeavesAThread.released.set()
    (result,) = report.results
    assert result.outcome == "failed", f"{broken.__name__} passes {clause}"
    assert result.message
