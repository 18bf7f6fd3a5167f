"""How far a target goes beyond its teacher, token by token: a rule that goes where the student is near the teacher already.

OUR READING of a short description of REOPD (arXiv 2608.11698), not of its code; what the description leaves open is marked (*).
"""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.numerics import masked

CALIBRATION = 10  # updates in which the size of a usual step is measured, and nothing is extrapolated (*)
SHARE_DECAY, SIZE_DECAY = 0.95, 0.9  # of the averages of rho and of s, in the order in which the description names them (*)

# Scalars float32: "share" and "size" (averages of rho and s), "budget" (B_0), "updates" (seen so far).
State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """lambda_t = 1 + gamma q_t: the target at token t is q^lambda_t r^(1 - lambda_t), q the teacher and r the reference.

    With x_t = log q(y_t) - log pi(y_t) and d_t = log q(y_t) - log r(y_t) of the drawn token, nats:

        q_t   = exp(-(e^x_t - x_t - 1) / tau), 1 where student and teacher agree on the token, from there down to 0
        rho   = sum_t |d_t| q_t / sum_t |d_t| over an update's tokens: the share of the way from r to q on which they agree
        s     = root of the mean of (d_t q_t)^2: the size of an extrapolation with gamma = 1
        gamma = clip(B_0 rho / s, 0, max_gain), of averages of rho and s over the updates before this one

    so that the size of what is added, gamma s, is a budget B_0 rho. (*) B_0 is the mean of s over the first CALIBRATION updates: gamma is
    rho where s is as it was, more where it has shrunk. Until then gamma is 0. (*) The averages begin at their first value. Tokens that
    teacher or reference rule out are not counted and have q_t = 0.

    lambda_t depends on the token that was drawn, so that no fixed target's gradient is followed.
    """

    tau: float = 0.007  # nats
    max_gain: float = 1.0

    def begin(self) -> State:
        """The state before the first update."""
        return {name: jnp.zeros((), jnp.float32) for name in ("share", "size", "budget", "updates")}

    def gain(self, state: State) -> jax.Array:
        """gamma of the next update."""
        size = jnp.where(state["size"] > 0, state["size"], 1)
        gain = jnp.clip(state["budget"] * state["share"] / size, 0, self.max_gain)
        return jnp.where((state["updates"] >= CALIBRATION) & (state["size"] > 0), gain, 0)

    def nearness(self, logp_BT: jax.Array, target_logp_BT: jax.Array, reference_logp_BT: jax.Array) -> jax.Array:
        """q_t [B, T], constant, of log-probs of the drawn tokens under student, teacher and reference, nats."""
        x_BT = target_logp_BT - logp_BT
        known_BT = jnp.isfinite(target_logp_BT - reference_logp_BT) & jnp.isfinite(x_BT)
        x_BT = jnp.where(known_BT, x_BT, 0)
        return jax.lax.stop_gradient(jnp.where(known_BT, jnp.exp((x_BT - jnp.expm1(x_BT)) / self.tau), 0))

    def sums(self, nearness_BT: jax.Array, step_BT: jax.Array, mask_BT: jax.Array, gain: jax.Array) -> dict[str, jax.Array]:
        """What `advance` needs of some rows, and the sum of lambda_t; those of microbatches add up. `step_BT` is d_t, nats."""
        counted_BT = mask_BT & jnp.isfinite(step_BT)
        step_BT = jnp.where(counted_BT, step_BT, 0)
        sums = {
            "way": jnp.abs(step_BT),
            "way_near": jnp.abs(step_BT) * nearness_BT,
            "square_near": jnp.square(step_BT * nearness_BT),
            "counted": jnp.ones_like(step_BT),
        }
        sums = {name: masked.masked_sum(value_BT, counted_BT) for name, value_BT in sums.items()}
        return sums | {"scale": masked.masked_sum(1 + gain * nearness_BT, mask_BT)}

    def advance(self, state: State, sums: dict[str, jax.Array]) -> State:
        """The state after an update with these sums over all of its rows; without a token that counts it stays as it was."""
        share = jnp.where(sums["way"] > 0, sums["way_near"] / jnp.where(sums["way"] > 0, sums["way"], 1), state["share"])
        size = jnp.sqrt(sums["square_near"] / jnp.maximum(sums["counted"], 1))
        first, calibrates = state["updates"] == 0, state["updates"] < CALIBRATION
        moved = {
            "share": jnp.where(first, share, SHARE_DECAY * state["share"] + (1 - SHARE_DECAY) * share),
            "size": jnp.where(first, size, SIZE_DECAY * state["size"] + (1 - SIZE_DECAY) * size),
            "budget": state["budget"] + jnp.where(calibrates, size / CALIBRATION, 0),
            "updates": state["updates"] + 1,
        }
        return {name: jnp.where(sums["counted"] > 0, value, state[name]) for name, value in moved.items()}
