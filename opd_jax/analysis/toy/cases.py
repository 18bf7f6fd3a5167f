"""The three facts of facts.py and the fixed points of ExOPD, each on enumerable models: rows for the toy study's output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.analysis import enumeration
from opd_jax.analysis.toy import extrapolation, facts

MODELS = {
    "tabular": {"length": 3},
    "shared parameters": {"features": 2, "length": 4, "seed": 2},
    "stop token": {"stop": 2, "length": 4, "seed": 3},
    "observations": {"observed": (1,), "features": 3, "length": 4, "seed": 5},
}
UPDATES, RATE = 10, 0.2  # of exact gradient descent, which make older parameters old


def rows(*, instances: int = 200) -> dict:
    """{entropy, fixed_points, breaking, breaks, off_policy}: lists of objects; the first is per model. Use under `jax.enable_x64`."""
    broken = extrapolation.breaking(instances=instances)
    return {
        "entropy": [{"model": name, **facts.entropy_reading(enumeration.make(name, **MODELS[name]))} for name in MODELS],
        "fixed_points": [{"length": length, **row} for length in (2, 4) for row in _fixed_points(length)],
        "breaking": broken,
        "breaks": extrapolation.verdicts(broken),
        "off_policy": _off_policy(),
    }


def _fixed_points(length: int) -> list[dict]:
    """Of a random tabular student; the reference is where it began, a unit of noise per logit away."""
    start = enumeration.make("tabular", length=length, seed=1)
    moved_FV = start.theta_FV + jnp.asarray(np.random.default_rng(0).normal(size=start.theta_FV.shape))
    return extrapolation.fixed_points(dataclasses.replace(start, theta_FV=moved_FV), start.logits(start.theta_FV))


def _off_policy() -> list[dict]:
    old = enumeration.make("shared parameters", **MODELS["shared parameters"])

    def descend(_, theta_FV):
        gradient = dataclasses.replace(old, theta_FV=theta_FV).exact_gradient("sequence_reverse_kl")
        return theta_FV - RATE * gradient.reshape(theta_FV.shape)

    student = dataclasses.replace(old, theta_FV=jax.lax.fori_loop(0, UPDATES, descend, old.theta_FV))
    behaviours = {
        "temperature 0.7": student.logits(student.theta_FV) / 0.7,
        f"parameters {UPDATES} updates older": old.logits(old.theta_FV),
    }
    return [{"behaviour": name, **row} for name, logits in behaviours.items() for row in facts.off_policy(student, logits)]
