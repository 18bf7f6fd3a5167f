"""The shift of a model's outputs against the tokens they predict: the one place where it is made."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax import parallel
from opd_jax.types import View


def states_before(view: View, read: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """What `read(tokens_BL, mask_BL) -> [B, L, ...]` says before each token of the completion, [B, T, ...]: entry t predicts token t.

    Every row of the prompt needs a real token in its last place.
    """
    tokens_BL = jnp.concatenate([view.prompt_BS, view.completion_BT], axis=1)
    mask_BL = jnp.concatenate([view.prompt_mask_BS.astype(bool), jnp.ones(view.completion_BT.shape, bool)], axis=1)
    if not parallel.splits_length():  # devices along the length divide that of the whole, not one token less
        tokens_BL, mask_BL = tokens_BL[:, :-1], mask_BL[:, :-1]
    first = view.prompt_BS.shape[1] - 1
    return read(tokens_BL, mask_BL)[:, first : first + view.completion_BT.shape[1]]
