"""What is subtracted from advantages: functions of the state, or of other rollouts."""

import jax
import jax.numpy as jnp

from opd_jax.numerics import masked

# Functions of the token's own prefix: -K_t (the value function of token credit; for to_go valid but myopic), and the optimum of token
# credit for the proxy |e_y - p|^2 of the squared score.
OF_THE_STATE = ("kl", "optimal")
# Functions of other rows; the last two include the own row.
ACROSS_ROWS = ("leave_one_out", "batch_mean", "position_mean")
BASELINES = ("none", *OF_THE_STATE, *ACROSS_ROWS)


def across_rows(advantage_BT: jax.Array, mask_BT: jax.Array, group_B: jax.Array, *, kind: str) -> jax.Array:
    """Baselines [B, T], constant, from the advantages of a whole batch; 0 where there is nothing to average.

        leave_one_out  mean over the other rollouts of the group that have a token at this position: keeps the expected gradient
        batch_mean     mean over all tokens of the batch
        position_mean  mean over all rollouts that have a token at this position

    The last two include the own sample. For sequence credit and one length that scales the expected gradient by 1 - 1/n (n rollouts);
    otherwise the bias has no such simple form, and is of order 1/n too.
    """
    mask_BT = mask_BT.astype(bool)
    advantage_BT = jax.lax.stop_gradient(jnp.where(mask_BT, advantage_BT, 0))
    if kind == "batch_mean":
        return jnp.broadcast_to(masked.masked_mean(advantage_BT, mask_BT), advantage_BT.shape)
    if kind == "position_mean":
        return jnp.broadcast_to(masked.masked_mean(advantage_BT, mask_BT, axis=0)[None], advantage_BT.shape)
    others_BB = (group_B[:, None] == group_B[None, :]) & ~jnp.eye(len(group_B), dtype=bool)
    others_BB = others_BB.astype(advantage_BT.dtype)
    total = lambda x_BT: jnp.matmul(others_BB, x_BT, precision=jax.lax.Precision.HIGHEST)  # sums of nats, not of bfloat16
    return total(advantage_BT) / jnp.maximum(total(mask_BT.astype(advantage_BT.dtype)), 1)
