from __future__ import annotations

import pytest
from guess_number import GuessNumber, GuessNumberConfig

from nemo_rl_core.testing import EnvironmentCase, EnvironmentContract


class TestContract(EnvironmentContract):
    """Everything that the core expects of an environment."""

    @pytest.fixture
    def environment(self):
        return EnvironmentCase(environment=GuessNumber, **GuessNumber.example)


def play(*guesses: str, number: int = 7, max_guesses: int = 4):
    game = GuessNumber(GuessNumberConfig(max_guesses=max_guesses), None)
    game.reset({"number": number}, seed=0)
    return [game.step({"role": "assistant", "content": guess}) for guess in guesses]


def test_hints_lead_to_the_number():
    low, high, none, hit = play("3", "I say 9!", "hm", "7")
    assert [s.messages[0]["content"] for s in (low, high, none)] == ["Higher. ", "Lower. ", "A number! "]
    assert hit.terminated and hit.rewards == {"found": 1.0, "speed": 0.25}


def test_a_game_is_lost_after_the_last_guess():
    last = play("1", "2", max_guesses=2)[-1]
    assert last.terminated and not last.messages and sum(last.rewards.values()) == 0


def test_the_number_follows_from_the_seed():
    drawn = []
    for seed in range(20):
        game = GuessNumber(GuessNumberConfig(), None)
        game.reset({}, seed=seed)
        drawn.append(game.number)
    assert len(set(drawn)) > 3 and max(drawn) <= 9
