"""How a kit is run: each clause apart, with a deadline, whatever surrounds it."""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from typing import ClassVar

import pytest
from attrs import frozen, make_class

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.protocols.environment import SingleTurnEnvironment
from nemo_rl_core.registry.discovery._kinds import KINDS
from nemo_rl_core.testing import Contract, EnvironmentCase, EnvironmentContract, RewardContract, contract_for, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses, contracts

made: list[str] = []


class GuessOnce(SingleTurnEnvironment):
    example: ClassVar[dict] = {"task": {"prompt": "2 + 2?"}, "response": "4"}

    async def score(self, task, response):
        return float(response == "4")


class Numbers(Contract):
    kind: ClassVar[str] = "losses"
    subject: ClassVar[str] = "number"

    def test_positive(self, number):
        """It is above 0.

        More is said here.
        """
        assert number > 0, f"it is {number}"

    def test_odd(self, number):
        """It is odd."""
        if number == 0:
            pytest.skip("0 is neither")
        assert number % 2 == 1, "it is even"

    @pytest.mark.parametrize("divisor", [2, 3, 5])
    def test_prime(self, number, divisor):
        """It is prime."""
        if number == divisor:
            pytest.skip("the divisor itself")
        assert number % divisor, f"{divisor} divides it"


def outcomes(report):
    return {result.clause: result.outcome for result in report.results}


def test_each_clause_is_told():
    report = run_kit(Numbers, lambda: 4)
    assert report.contract == "Numbers"
    assert outcomes(report) == {"positive": "passed", "odd": "failed", "prime": "failed"}
    assert [r.message for r in report.results] == ["", "it is even", "2 divides it"]
    assert report.results[0].sentence == "It is above 0."
    assert report.failed == ("odd", "prime") and not report.passed
    assert all(result.seconds >= 0 for result in report.results)


def test_a_skip_is_no_failure_and_a_parameter_that_ran_counts():
    report = run_kit(Numbers, lambda: 7)
    assert report.passed and outcomes(report)["prime"] == "passed"
    assert outcomes(run_kit(Numbers, lambda: 3)) == {"positive": "passed", "odd": "passed", "prime": "passed"}
    (odd,) = run_kit(Numbers, lambda: 0, only=["odd"]).results
    assert (odd.outcome, odd.message) == ("skipped", "0 is neither")


def test_a_kit_in_which_nothing_ran_has_not_passed():
    assert not run_kit(Numbers, lambda: 0, only=["odd"]).passed


def test_only_some_clauses():
    assert list(outcomes(run_kit(Numbers, lambda: 1, only=["prime", "odd"]))) == ["odd", "prime"]
    with pytest.raises(NemoRLError, match="no clause od.* It has: positive, odd, prime"):
        run_kit(Numbers, lambda: 1, only=["od"])


def test_the_subject_is_made_anew_for_each_clause():
    made.clear()
    run_kit(Numbers, lambda: made.append("x") or len(made))
    assert len(made) == 5  # three clauses, one of them three times


def test_a_subject_that_cannot_be_made_fails_every_clause():
    def make():
        raise ValueError("no such number")

    report = run_kit(Numbers, make)
    assert set(outcomes(report).values()) == {"failed"}
    assert {result.message for result in report.results} == {"ValueError: no such number"}


def test_no_subject_is_told():
    report = run_kit(Numbers, lambda: None, only=["odd"])
    assert "is a `return` missing?" in report.results[0].message


@pytest.mark.parametrize(
    "wait", [lambda: time.sleep(60), lambda: asyncio.run(asyncio.sleep(60))], ids=["sync", "async"]
)
def test_a_clause_that_hangs_fails_by_its_name(wait):
    class Hangs(Numbers):
        def test_odd(self, number):
            """It is odd."""
            wait()

    report = run_kit(Hangs, lambda: 1, timeout_s=0.3)
    assert report.failed == ("odd",)
    assert report.results[1].message == "clause test_odd was not done after 0.3 s: something waits without a deadline"


def test_kits_do_not_find_each_other():
    class Other(Numbers):
        def test_odd(self, number):
            """It is odd."""
            raise AssertionError("the other kit")

    run_kit(Other, lambda: 1)
    assert run_kit(Numbers, lambda: 1).passed


def test_the_surrounding_run_has_no_influence(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    assert run_kit(Numbers, lambda: 1).passed
    assert os.environ["PYTEST_ADDOPTS"] == "--no-such-option"
    assert os.environ["PYTEST_PLUGINS"] == "no_such_plugin"


def test_a_clause_that_cannot_be_collected_has_failed():
    class Broken(Numbers):
        @pytest.mark.parametrize("nothing")
        def test_odd(self, number):
            """It is odd."""

    report = run_kit(Broken, lambda: 1)
    assert "odd" in report.failed
    assert "it did not run" in report.results[1].message


def test_what_pytest_does_not_survive_fails_the_clause():
    class Unprintable(Exception):
        def __str__(self):
            raise KeyError("no words")

        __repr__ = __str__

    class Breaks(Numbers):
        def test_odd(self, number):
            """It is odd."""
            raise Unprintable

    report = run_kit(Breaks, lambda: 1)
    assert "odd" in report.failed and "positive" not in report.failed


def test_an_interrupt_ends_the_kit():
    class Interrupted(Numbers):
        def test_odd(self, number):
            """It is odd."""
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_kit(Interrupted, lambda: 1)


class Speaks(Contract):
    kind: ClassVar[str] = "losses"
    subject: ClassVar[str] = "speaker"

    def test_says(self, speaker):
        """It says hello."""
        assert speaker.word == "hello", f"it says {speaker.word}"


class Speaker:
    word = "hello"


@frozen
class Words:
    word: str = "hello"


class SpeakerWithOptions:
    config_class = Words

    denominator = "tokens"
    needs = ("logprobs",)

    def __init__(self, config):
        self.word = config.word

    def __call__(self, batch, output):
        raise NotImplementedError


class SpeakerWithAnExample(SpeakerWithOptions):
    config_class = make_class("Options", ["word"])
    example: ClassVar[dict] = {"word": "hello"}


def speaker():
    return Speaker()


GIVEN = {
    "a class": Speaker,
    "an object": Speaker(),
    "a function": speaker,
    "a partial": partial(SpeakerWithOptions, Words()),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_kit_takes_a_class_an_object_or_a_function_that_makes_one(given):
    assert run_kit(Speaks, given).passed


@pytest.mark.parametrize("given", [SpeakerWithOptions, SpeakerWithAnExample])
def test_a_class_is_made_with_its_defaults_or_its_example(given):
    assert run_kit(Speaks, given).passed


def reward(response):
    return 1.0


def test_a_function_with_arguments_is_tested_itself():
    assert run_kit(RewardContract, reward, only=["returns_finite_numbers"]).passed


@pytest.mark.parametrize("given", [GuessOnce, EnvironmentCase(environment=GuessOnce, **GuessOnce.example)])
def test_an_environment_is_taken_as_a_class_with_an_example_or_as_a_case(given):
    assert run_kit(EnvironmentContract, given, only=["good_is_better"]).passed


@pytest.mark.parametrize("given", ["sharp", None, 7, {"a": 1}, [Speaker()]])
def test_what_is_nothing_to_test_is_told(given):
    with pytest.raises(
        NemoRLError, match=r"run_kit\(Speaks, \.\.\.\) wants what the fixture `speaker` would return.* It got"
    ):
        run_kit(Speaks, given)


def test_a_case_of_another_kind_is_told():
    with pytest.raises(NemoRLError, match="wants what the fixture `environment` would return"):
        run_kit(EnvironmentContract, Speaker())


def test_a_class_that_says_not_what_to_play_is_told():
    class WithoutExample(GuessOnce):
        example = None

    with pytest.raises(NemoRLError, match="does not say what to play"):
        run_kit(EnvironmentContract, WithoutExample)


def test_a_contract_comes_first():
    with pytest.raises(NemoRLError, match=r"wants a contract first, such as LossContract. It got .*Speaker"):
        run_kit(Speaker, Speaks)


@pytest.mark.parametrize("kind", contracts())
def test_every_contract_is_in_order(kind):
    contract = contract_for(kind)
    assert kind in KINDS and contract.kind == kind
    sentences = clauses(contract)
    assert len(sentences) >= 8
    for name, sentence in sentences.items():
        assert sentence != f"test_{name}" and sentence.endswith("."), f"{kind}: {name} has no sentence"


def test_a_kind_without_a_kit_is_told():
    with pytest.raises(NemoRLError, match="no conformance kit for 'commands'.*losses"):
        contract_for("commands")
