"""Dimension letters and the records that flow through a training step.

Letters, the same in array suffixes (`logp_BT`) and, in lower case, in einsum strings:
    B rollouts (= P prompts x G samples each)   S prompt length      T completion length   L total length
    V vocabulary   K top-k   D model width   F feed-forward width   N query heads   H head dim

Per-token arrays are `[B, T]` over completion tokens only: entry t speaks of token t given the prompt and the tokens before t.
Prompts are padded on the left, completions on the right. The stop token is part of the completion; what follows it is padding.
"""

import flax.struct
import jax

MESSAGE_LENGTH = 2000  # characters of an error message


def one_line(text: str) -> str:
    """Text for a message: what does not print (line breaks, terminal codes, reversed text) is escaped, the middle of a long one dropped."""
    return _shortened("".join(char if char.isprintable() else repr(char)[1:-1] for char in _shortened(text)))


def _shortened(text: str) -> str:
    if len(text) <= MESSAGE_LENGTH:
        return text
    return f"{text[: MESSAGE_LENGTH * 3 // 5]} ... {text[5 - MESSAGE_LENGTH * 2 // 5 :]}"


class UserError(ValueError):
    """A mistake that the user can repair. One line: which field or file, its value, what is valid, the remedy."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@flax.struct.dataclass
class Prompts:
    """Left-padded prompts, one row per rollout; `id_B` names the rollout (prompt id * G + sample) and drives its random draws."""

    tokens_BS: jax.Array  # int32
    mask_BS: jax.Array  # bool, True on real tokens
    id_B: jax.Array  # uint32
    hidden_BTD: jax.Array | None = None  # what a model elsewhere said after them of some completions (apart.py); None: the model reads here


@flax.struct.dataclass
class View:
    """What one model reads: a prompt of its own, then the completion that all models share."""

    prompt_BS: jax.Array  # int32, left-padded
    prompt_mask_BS: jax.Array  # bool
    completion_BT: jax.Array  # int32, right-padded; every position is read, the loss mask is elsewhere
    hidden_BTD: jax.Array | None = None  # as in Prompts


@flax.struct.dataclass
class Rollout:
    """Completions and the law that produced them. `mask_BT` is True on the tokens to learn from, stop token included."""

    tokens_BT: jax.Array  # int32
    mask_BT: jax.Array  # bool
    logp_BT: jax.Array  # nats under the sampled policy at temperature 1, 0 where the mask is False
    behaviour_logp_BT: jax.Array  # nats under the law that sampled (temperature, top-p, top-k, min-p)
    id_B: jax.Array  # uint32
    stopped_B: jax.Array  # bool, False where max_new_tokens, or a limit of turns, cut the completion off
    present_BT: jax.Array | None = None  # bool, True on all tokens that stand in the completion: drawn, given, observed; None: mask_BT

    @property
    def standing_BT(self) -> jax.Array:
        """Which tokens the text of a completion consists of, whoever wrote them."""
        return self.mask_BT if self.present_BT is None else self.present_BT


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes."""

    step: jax.Array  # int32, updates done
    params: dict
    opt_state: tuple
    finite: jax.Array  # bool; once a loss or gradient is not finite, no later update changes anything
    kept: dict = flax.struct.field(default_factory=dict)  # a copy of the student that follows it, of a teacher bank that has one
    adaptive: dict = flax.struct.field(default_factory=dict)  # scalars of the rule of an adaptive extrapolation


def view(prompts: Prompts, rollout: Rollout) -> View:
    """The view of a model that reads `prompts` before the completions of `rollout`."""
    return View(prompts.tokens_BS, prompts.mask_BS, rollout.tokens_BT, prompts.hidden_BTD)
