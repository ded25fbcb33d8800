"""The contract of a generation backend.

Each clause is a way in which an engine was not the policy: logprobs of another temperature, a stop that loses its
token, a seed that depends on the neighbours, a refit that did not arrive. The engine is compared with a plain
forward pass of the same tiny checkpoint.
"""

from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import attrs
import pytest
import torch

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.testing.conformance.cases.generation_bench import (
    PROMPT,
    PROMPTS,
    EngineUnderTest,
    GenerationBench,
    Start,
    all_different,
    chi_square,
    in_one_buffer,
    make_request,
    numbered_prompts,
)
from nemo_rl_core.testing.conformance.cases.reference import forward_logits, sampling_distribution
from nemo_rl_core.testing.conformance.frame.subject import Expecting, configured

__all__ = ["GenerationBackendContract"]

CAPABILITIES = frozenset({"share_weights", "in_flight_updates", "prefix_sharing", "sleep"})


class GenerationBackendContract(GenerationBench):
    """What every engine must do. Define the fixture `engine`: the component class.

    Attributes:
        config_options: Options of the component, if the defaults do not suit the kit.
        model_shape: `config.json` of the model that is sampled from, for an engine that cannot run the default one.
        device: torch device of the engine.
        tolerance: Largest difference of a logprob from the plain forward pass.
        num_concurrent: Requests at a time, more than the engine decodes together.
        wait_s: Deadline of any completion.
    """

    # -- what it says of itself ----------------------------------------------------------------

    def test_declares_itself(self, engine: EngineUnderTest) -> None:
        """It names an attrs class of its options, and only capabilities that exist."""
        component = configured(engine, self.config_options).loaded
        assert attrs.has(component.config_class), f"config_class is {component.config_class!r}, not an attrs class"
        unknown = set(component.capabilities) - CAPABILITIES
        assert not unknown, f"capabilities {sorted(unknown)} are unknown; they are {sorted(CAPABILITIES)}"

    # -- logprobs ------------------------------------------------------------------------------

    def test_logprobs(self, start: Start) -> None:
        """Logprobs are those of a full forward pass at the sampling temperature: 0.6, 1 and 1.3 in one batch."""
        temperatures = (0.6, 1.0, 1.3)
        requests = [
            make_request(f"{i}@{t}", prompt, temperature=t, seed=i, max_new_tokens=12, ignore_eos=True)
            for i, prompt in enumerate(PROMPTS)
            for t in temperatures
        ]
        self.same_logprobs(requests, self.complete(start(), requests), self.tiny.model)

    def test_greedy(self, start: Start) -> None:
        """Temperature 0 takes the most likely token, with its logprob under the untempered distribution."""
        requests = [
            make_request(str(i), p, temperature=0.0, max_new_tokens=8, ignore_eos=True) for i, p in numbered_prompts()
        ]
        completions = self.complete(start(), requests)
        for request, completion in zip(requests, completions, strict=True):
            best = self.predictions(self.tiny.model, request, completion).argmax(-1).tolist()
            assert completion.token_ids == best, f"tokens {completion.token_ids}; the most likely ones are {best}"
        self.same_logprobs(requests, completions, self.tiny.model)

    def test_top_p_and_top_k(self, start: Start) -> None:
        """With top-p and top-k only the likely tokens are drawn, with logprobs of the distribution drawn from."""
        limits: tuple[dict[str, Any], ...] = ({"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.7, "top_k": 6})
        requests = [
            make_request(f"{i}/{j}", prompt, seed=i, max_new_tokens=12, ignore_eos=True, **limit)
            for i, prompt in numbered_prompts()
            for j, limit in enumerate(limits)
        ]
        self.same_logprobs(requests, self.complete(start(), requests), self.tiny.model)

    def test_sampling_follows_the_distribution(self, start: Start) -> None:
        """Tokens are drawn as often as the distribution says (chi-square over 1,500 draws at temperature 0.8)."""
        draws = 1500
        requests = [make_request(str(i), PROMPT, temperature=0.8, seed=i, max_new_tokens=1) for i in range(draws)]
        tokens = torch.tensor([c.token_ids[0] for c in self.complete(start(), requests)])
        expected = sampling_distribution(forward_logits(self.tiny.model, PROMPT)[-1], temperature=0.8).exp() * draws
        deviation = chi_square(torch.bincount(tokens, minlength=len(expected)), expected)
        assert deviation < 4.0, f"the drawn tokens are {deviation:.1f} standard deviations off the distribution"

    # -- where a completion ends ---------------------------------------------------------------

    def test_length(self, start: Start) -> None:
        """`max_new_tokens` is kept to the token, and the reason is then "length"."""
        counts = (1, 2, 7, 30)
        requests = [make_request(str(n), PROMPT, max_new_tokens=n, seed=n, ignore_eos=True) for n in counts]
        for completion, count in zip(self.complete(start(), requests), counts, strict=True):
            found = len(completion.token_ids)
            assert found == count, f"max_new_tokens={count} gave {found} tokens"
            assert len(completion.logprobs) == found, f"{found} tokens have {len(completion.logprobs)} logprobs"
            assert completion.finish_reason == "length", f"finish_reason is {completion.finish_reason!r}"

    def test_context_ends(self, start: Start) -> None:
        """Prompt and completion together fill the context and do not pass it; the reason is "length"."""
        engine = start(max_sequence_length=32)
        (completion,) = self.complete(engine, [make_request("r", PROMPT, max_new_tokens=100, seed=0, ignore_eos=True)])
        total = len(PROMPT) + len(completion.token_ids)
        assert total == 32, f"prompt and completion have {total} tokens in a context of 32"
        assert completion.finish_reason == "length", f"finish_reason is {completion.finish_reason!r}"

    def test_stop_token(self, start: Start) -> None:
        """A stop token ends the completion and is kept as its last token; it is the stop reason."""
        self.stops(start(), lambda tokens: {"stop_token_ids": (tokens[3],)}, lambda tokens: tokens[3])

    def test_end_of_sequence(self, start: Start) -> None:
        """The model's end-of-sequence token ends the completion and is kept with its logprob, but for `ignore_eos`."""
        eos = self.tiny.tokenizer.eos_token_id
        engine = start()
        common = {"temperature": 1.5, "max_new_tokens": 60}
        requests = [make_request(str(i), PROMPT, seed=i, ignore_eos=i % 2 == 1, **common) for i in range(60)]
        completions = self.complete(engine, requests)
        stopped = 0
        for completion in completions[::2]:
            assert eos not in completion.token_ids[:-1], "it went on after the end-of-sequence token"
            at_eos = completion.token_ids[-1] == eos
            stopped += at_eos
            reason = "stop" if at_eos else "length"
            assert completion.finish_reason == reason, f"finish_reason is {completion.finish_reason!r}, not {reason!r}"
        assert stopped, "no completion ended with the end-of-sequence token, though it was likely: it is dropped"
        ended = [i for i, completion in enumerate(completions) if completion.finish_reason == "stop"][:8]
        pairs = [requests[i] for i in ended], [completions[i] for i in ended]
        self.same_logprobs(*pairs, self.tiny.model, "with the end-of-sequence token as the last: ")
        for completion in completions[1::2]:
            assert len(completion.token_ids) == 60, "it ended before max_new_tokens in spite of ignore_eos"

    def test_stop_string(self, start: Start) -> None:
        """A stop string ends the completion, also across tokens; the tokens that complete it are kept."""
        decode = self.tiny.tokenizer.decode
        self.stops(start(), lambda tokens: {"stop": (decode(tokens[2:4]),)}, lambda tokens: decode(tokens[2:4]))

    # -- many at a time ------------------------------------------------------------------------

    def test_many_at_a_time(self, start: Start) -> None:
        """Many requests of mixed length at a time are each answered once, with their own id and prompt's logprobs."""
        requests = [
            make_request(f"r{i}", PROMPTS[i % len(PROMPTS)], seed=i, max_new_tokens=1 + i * 7 % 23, ignore_eos=True)
            for i in range(self.num_concurrent)
        ]
        completions = self.complete(start(), requests)
        for request, completion in zip(requests, completions, strict=True):
            same = completion.request_id == request.request_id
            assert same, f"request {request.request_id} got the completion of {completion.request_id}"
            count = len(completion.token_ids)
            assert count == request.sampling.max_new_tokens, f"{request.request_id} got {count} tokens"
        self.same_logprobs(requests, completions, self.tiny.model)

    def test_serves_at_the_same_time(self, start: Start) -> None:
        """Requests are decoded together: short ones do not wait until a long one before them is through."""
        engine = start()
        long = make_request("long", PROMPT, seed=1, max_new_tokens=120, ignore_eos=True)
        short = [make_request(f"s{i}", p, seed=i, max_new_tokens=2, ignore_eos=True) for i, p in numbered_prompts()[:4]]

        async def run() -> int:
            first = asyncio.ensure_future(engine.generate(long))
            others = [asyncio.ensure_future(engine.generate(request)) for request in short]
            await first
            for _ in range(10):  # an engine that answers a whole batch at once hands its answers over one by one
                await asyncio.sleep(0)
            waiting = sum(not call.done() for call in others)
            await asyncio.gather(*others)
            return waiting

        waiting = self.run(run(), "a long request and four short ones")
        assert waiting == 0, (
            f"{waiting} of 4 short requests still waited when the long one before them was through: one at a time"
        )

    def test_seed(self, start: Start) -> None:
        """Equal seed, prompt and sampling give equal tokens, whatever the request's name and what else is in flight."""
        engine = start()
        mine = make_request("mine", PROMPT, seed=11, max_new_tokens=16, ignore_eos=True)
        others = [
            make_request(f"o{i}", p, seed=i, max_new_tokens=5 + i, ignore_eos=True) for i, p in numbered_prompts()
        ]
        (alone,) = self.complete(engine, [mine])
        (renamed,) = self.complete(engine, [attrs.evolve(mine, request_id="of another name")])
        *_, crowded = self.complete(engine, [*others, mine])
        (elsewhere,) = self.complete(start(seed=5), [mine])
        assert renamed.token_ids == alone.token_ids, "asked again by another request_id it gave other tokens"
        assert crowded.token_ids == alone.token_ids, "its tokens depend on what else is in flight"
        assert elsewhere.token_ids == alone.token_ids, "another engine with another seed of its own gave other tokens"

    def test_seeds_differ(self, start: Start) -> None:
        """Different seeds give different tokens."""
        requests = [make_request(str(i), PROMPT, seed=i, max_new_tokens=16, ignore_eos=True) for i in range(8)]
        all_different(self.complete(start(), requests), "seeds")

    def test_samples_differ(self, start: Start) -> None:
        """Several requests of one prompt without a seed are different samples."""
        requests = [make_request(str(i), PROMPT, max_new_tokens=16, ignore_eos=True) for i in range(8)]
        all_different(self.complete(start(), requests), "requests without a seed")

    def test_cancelling(self, start: Start) -> None:
        """Cancelling calls frees their places: those cancelled leave, and later requests are served."""
        engine = start()
        long = [make_request(f"l{i}", PROMPT, seed=i, max_new_tokens=200) for i in range(self.num_concurrent)]
        long = [attrs.evolve(r, sampling=attrs.evolve(r.sampling, ignore_eos=True)) for r in long]
        short = [make_request(f"s{i}", p, seed=i, max_new_tokens=4, ignore_eos=True) for i, p in numbered_prompts()]

        async def run() -> list[Any]:
            given_up = [asyncio.ensure_future(engine.generate(request)) for request in long]
            kept = asyncio.gather(*(engine.generate(request) for request in short[:3]))
            await asyncio.sleep(0.02)
            for call in given_up:
                call.cancel()
            left = await asyncio.gather(*given_up, return_exceptions=True)
            swallowed = sum(1 for found in left if not isinstance(found, (asyncio.CancelledError, Completion)))
            assert not swallowed, f"{swallowed} cancelled calls raised something else than CancelledError"
            return [*await kept, *await asyncio.gather(*(engine.generate(request) for request in short[3:]))]

        completions = self.run(run(), "the requests that were not cancelled")
        self.same_logprobs(short, completions, self.tiny.model)

    def test_pause_and_resume(self, start: Start) -> None:
        """Requests that arrive during a pause are all answered after `resume`; an engine that pauses starts none."""
        engine = start()
        requests = [make_request(str(i), p, seed=i, max_new_tokens=4, ignore_eos=True) for i, p in numbered_prompts()]
        pauses = type(engine).pause is not GenerationBackend.pause

        async def run() -> list[Completion]:
            engine.pause()
            calls = [asyncio.ensure_future(engine.generate(request)) for request in requests]
            await asyncio.sleep(0.1)
            done = sum(call.done() for call in calls)
            engine.resume()
            assert not (pauses and done), f"{done} of {len(calls)} requests were answered during the pause"
            return list(await asyncio.gather(*calls))

        completions = self.run(run(), "requests that arrived during a pause")
        self.same_logprobs(requests, completions, self.tiny.model)

    # -- what cannot be served -----------------------------------------------------------------

    def test_empty_prompt(self, start: Start) -> None:
        """An empty prompt is refused with a GenerationError, and the engine goes on."""
        self.refuses(start(), ())

    def test_prompt_too_long(self, start: Start) -> None:
        """A prompt that leaves no room in the context is refused with a GenerationError, and the engine goes on."""
        for length in (32, 40):
            self.refuses(start(max_sequence_length=32), tuple(range(3, 3 + length)))

    # -- new weights ---------------------------------------------------------------------------

    def test_refit(self, start: Start) -> None:
        """After a refit it samples from the new weights and stamps the new version, and from the old ones before."""
        engine, new = start(), self.tiny.changed_weights()
        requests = [
            make_request(str(i), p, temperature=0.0, max_new_tokens=8, ignore_eos=True) for i, p in numbered_prompts()
        ]
        self.update(engine, 3, self.tiny.weights())
        before = self.complete(engine, requests)
        self.update(engine, 8, new)
        after = self.complete(engine, requests)
        for completions, version in ((before, 3), (after, 8)):
            stamped = {v for c in completions for v in (c.weight_version, c.last_weight_version)}
            assert stamped == {version}, f"completions of weight version {version} are stamped {sorted(stamped)}"
        self.same_logprobs(requests, before, self.tiny.model)
        self.same_logprobs(requests, after, self.tiny.copy(new), "after the refit: ")

    def test_fingerprint(self, start: Start) -> None:
        """Its fingerprint is that of the weights it was given."""
        engine = start()
        for version, weights in enumerate((self.tiny.changed_weights(), self.tiny.weights()), start=1):
            self.update(engine, version, weights)
            expected = fingerprint(weights.items())
            assert engine.fingerprint() == expected, "the fingerprint is not that of the weights of the refit"

    def test_caches_are_fresh_after_a_refit(self, start: Start) -> None:
        """Prompts seen before a refit, and their continuations, are computed anew after it: nothing cached is read."""
        engine, new = start(), self.tiny.changed_weights()
        seen = [
            make_request(f"{i}/{j}", p, seed=j, max_new_tokens=4, ignore_eos=True)
            for i, p in numbered_prompts()
            for j in (0, 1)
        ]
        self.complete(engine, seen)
        self.update(engine, 1, new)
        longer = [make_request("long", (*PROMPT, 70, 71), seed=0, max_new_tokens=4, ignore_eos=True)]
        requests = [*seen, *longer]
        self.same_logprobs(requests, self.complete(engine, requests), self.tiny.copy(new), "after the refit: ")

    def test_copies_unless_shared(self, start: Start) -> None:
        """Without `share` it has its own copy: the trainer changing its tensors afterwards changes nothing here."""
        engine, given = start(), self.tiny.changed_weights()
        request = make_request("r", PROMPT, seed=1, max_new_tokens=8, ignore_eos=True)
        self.update(engine, 1, given)
        kept = self.tiny.copy(given)
        for tensor in given.values():
            tensor.zero_()
        self.same_logprobs([request], self.complete(engine, [request]), kept, "the trainer's tensors changed: ")

    def test_copies_each_before_the_next(self, start: Start) -> None:
        """Without `share` every tensor is copied before the next one is asked for: both come in the same memory."""
        engine, given = start(), self.tiny.changed_weights()
        request = make_request("r", PROMPT, seed=1, max_new_tokens=8, ignore_eos=True)
        engine.update_weights(1, in_one_buffer(given), share=False)
        same = engine.fingerprint() == fingerprint(given.items())
        assert same, "it holds tensors that were valid only until the next one was asked for: the fingerprint is wrong"
        found = self.complete(engine, [request])
        self.same_logprobs([request], found, self.tiny.copy(given), "all weights came in one buffer: ")

    def test_shared_weights(self, start: Start) -> None:
        """With `share` it samples from the weights it is given, and leaves the trainer's tensors as they are."""
        engine = start()
        if "share_weights" not in engine.capabilities:
            pytest.skip("it lacks the capability share_weights")
        live = self.tiny.changed_weights()
        request = make_request("r", PROMPT, seed=1, max_new_tokens=8, ignore_eos=True)
        for version in (1, 2):
            for name, tensor in self.tiny.changed_weights(seed=version).items():
                live[name].copy_(tensor)
            before = fingerprint(live.items())
            engine.update_weights(version, iter(live.items()), share=True)
            found = self.complete(engine, [request])
            assert fingerprint(live.items()) == before, "it changed the trainer's tensors"
            self.same_logprobs([request], found, self.tiny.copy(live), f"share=True, version {version}: ")

    @pytest.mark.parametrize("fault", ["unknown name", "wrong shape", "missing"])
    def test_wrong_weights(self, start: Start, fault: str) -> None:
        """Weights with an unknown name, a wrong shape or one missing are refused with a GenerationError.

        It then samples from the old weights, or refuses to until a refit succeeds; never from a mixture.
        """
        engine, old, wrong = start(), self.tiny.weights(), self.tiny.changed_weights()
        last = list(wrong)[-1]
        if fault == "unknown name":
            wrong["no.such.weight"] = torch.zeros(3)
        elif fault == "wrong shape":
            wrong[last] = torch.zeros(*wrong[last].shape, 2)
        else:
            del wrong[last]
        self.update(engine, 1, old)
        request = make_request("r", PROMPT, seed=1, max_new_tokens=8, ignore_eos=True)
        with Expecting(GenerationError, f"a refit with weights of which one is of a fault: {fault}"):
            self.update(engine, 2, wrong)
        try:
            completions = self.complete(engine, [request])
        except GenerationError:
            completions = []
        self.same_logprobs(
            [request][: len(completions)], completions, self.tiny.model, f"after a refused refit ({fault}): "
        )
        assert all(c.weight_version == 1 for c in completions), "a refused refit changed the version"
        self.update(engine, 3, old)
        self.same_logprobs([request], self.complete(engine, [request]), self.tiny.model, "after the next refit: ")

    def test_in_flight_update(self, start: Start) -> None:
        """Updated in flight, a completion is stamped with the version of its first token and with that of its last."""
        engine = start(max_sequence_length=1000)
        if "in_flight_updates" not in engine.capabilities:
            pytest.skip("it lacks the capability in_flight_updates")
        for version in range(1, 6):  # an engine may be through before the update comes
            found = self.run(self.updated_in_flight(engine, version), "a request during an update")
            assert found.weight_version in (version - 1, version), (
                f"weights went from version {version - 1} to {version}; the first token is stamped "
                f"{found.weight_version}"
            )
            if found.last_weight_version == version and found.weight_version == version - 1:
                return
            assert found.last_weight_version >= found.weight_version, "the last token is older than the first"
        pytest.fail("no completion that was in flight during an update is stamped with both versions")

    # -- the rest of its life ------------------------------------------------------------------

    def test_sleep_and_wake(self, start: Start) -> None:
        """After `sleep` and `wake`, also twice, it samples as before."""
        engine = start()
        if "sleep" not in engine.capabilities:
            pytest.skip("it lacks the capability sleep")
        requests = [make_request(str(i), p, seed=i, max_new_tokens=8, ignore_eos=True) for i, p in numbered_prompts()]
        self.update(engine, 4, self.tiny.weights())
        before = self.complete(engine, requests)
        for call in (engine.sleep, engine.sleep, engine.wake, engine.wake):
            call()
        after = self.complete(engine, requests)
        same = [c.token_ids for c in before] == [c.token_ids for c in after]
        assert same, "it samples other tokens after sleep and wake"
        assert {c.weight_version for c in after} == {4}, "it lost its weight version while it slept"

    def test_update_asleep(self, start: Start) -> None:
        """Weights that come while it sleeps are those that it samples from when it is awake."""
        engine = start()
        if "sleep" not in engine.capabilities:
            pytest.skip("it lacks the capability sleep")
        requests = [make_request(str(i), p, seed=i, max_new_tokens=8, ignore_eos=True) for i, p in numbered_prompts()]
        self.complete(engine, requests)
        new = self.tiny.changed_weights()
        engine.sleep()
        self.update(engine, 7, new)
        assert engine.fingerprint() == fingerprint(new.items()), "its fingerprint is not that of what it got asleep"
        engine.wake()
        after = self.complete(engine, requests)
        self.same_logprobs(requests, after, self.tiny.copy(new), "updated asleep: ")
        assert {c.weight_version for c in after} == {7}, "it did not take the version of weights that it got asleep"

    def test_metrics(self, start: Start) -> None:
        """`metrics` is a mapping of names to finite numbers."""
        engine = start()
        self.complete(engine, [make_request("r", PROMPT, seed=0, max_new_tokens=4)])
        for name, value in engine.metrics().items():
            fine = isinstance(name, str) and isinstance(value, int | float) and math.isfinite(value)
            assert fine, f"metric {name!r} is {value!r}"

    def test_shutdown(self, start: Start) -> None:
        """`shutdown` may be called twice and leaves no thread behind."""
        before = set(threading.enumerate())
        engine = start()
        self.complete(engine, [make_request("r", PROMPT, seed=0, max_new_tokens=4)])
        engine.shutdown()
        engine.shutdown()
        for thread in set(threading.enumerate()) - before:
            thread.join(5.0)
            assert not thread.is_alive(), f"thread {thread.name!r} still runs after shutdown"
