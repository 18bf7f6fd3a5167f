"""What answers a model while it writes: environments, and how a completion falls into the model's turns and the answers to them.

A model calls an environment by text that ends in the environment's closing mark. The call ends the model's turn, the answer is appended as
an observation, which is read and not learnt from, and the model goes on. sandbox.py runs programs, for verifiers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Observation:
    """What an environment says. `error`: the call was none that it understands, and the text says so to the model."""

    text: str
    error: bool = False


class Environment(Protocol):
    """What answers calls. The answer is a function of the turn alone, so that a completion can be read again."""

    closes: str  # the mark that ends a call, one printable ASCII character; observations do not have it

    def answer(self, turn: str) -> Observation:
        """The answer to a turn, the text that the model has written since the last observation; it ends in the mark. Never raises."""
        ...


@dataclasses.dataclass(frozen=True)
class Turn:
    """A piece of a completion that the model wrote."""

    written: str
    observation: Observation | None  # what the environment answers to the call that ends it; None: no call does
    answered: bool = False  # the answer is what follows


def turns(environment: Environment, text: str) -> list[Turn]:
    """The turns of a completion; joined with the answers that follow them they are its text."""
    found: list[Turn] = []
    while environment.closes in text:
        end = text.index(environment.closes) + len(environment.closes)
        observation = environment.answer(text[:end])
        answered = text.startswith(observation.text, end)
        found.append(Turn(text[:end], observation, answered))
        text = text[end + len(observation.text) * answered :]
    return [*found, Turn(text, None)] if text or not found or found[-1].answered else found


def counts(environment: Environment, texts: Sequence[str]) -> tuple[float, float]:
    """(turns, calls that the environment does not understand), means over completions."""
    each = [turns(environment, text) for text in texts]
    errors = sum(turn.observation is not None and turn.observation.error for found in each for turn in found)
    return sum(map(len, each)) / len(each), errors / len(each)
