"""ExOPD in the tabular case: where its targets lead for each lambda, and from which lambda on extrapolation breaks.

What breaking means here. Completions have a true reward r(y). The teacher is meant to be the optimum of RL with r at temperature 1 from the
reference, q ~ ref exp(r); lambda then divides the temperature, and with everything exact the reward of the (unnormalised) fixed point can
only rise with lambda. It may break when q or ref is not what the formula takes it for:
    teacher with errors   q ~ ref exp(r + e), e normal per completion with a given standard deviation, the size of the error
    wrong reference       the formula has ref', whose logits differ from those of ref by normal noise of that size per prefix and token
Extrapolation breaks from the first lambda on at which the mean true reward of the fixed point lies below the teacher's own (lambda = 1),
the 95% interval of the paired difference over instances apart from 0; None if there is none on the grid. Use under `jax.enable_x64`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.analysis import enumeration, stats
from opd_jax.analysis.toy import facts

STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
SIZES = (1.0, 2.0, 3.0)  # of errors; rewards have standard deviation 1
CASES = (("all exact", 0.0), *(("teacher with errors", size) for size in SIZES), *(("wrong reference", size) for size in SIZES))
FORMS = {"normalised": True, "unnormalised": False}


def fixed_points(model: enumeration.Enumerable, reference_NTV: jax.Array, strengths=STRENGTHS) -> list[dict]:
    """Per lambda, for a tabular model:

    total_variation   between the fixed points of both forms' rewards to go
    stationary        the largest gradient entry of each form and credit at its own fixed point: 0 but for rounding
    kept_to_go        that of the unnormalised form's rewards to go at the normalised fixed point
    token_difference, to_go_difference   norm of the difference of both forms' gradients at the model's own student, relative
    """

    @jax.jit
    def gradients(theta_FV, strength):
        student = dataclasses.replace(model, theta_FV=theta_FV)
        arguments = [(credit, form) for credit in ("token", "to_go") for form in FORMS]
        of = lambda credit, form: facts.extrapolation_gradient(student, reference_NTV, strength, credit=credit, normalise=FORMS[form])
        return {(credit, form): of(credit, form) for credit, form in arguments}

    rows = []
    for strength in strengths:
        laws = {form: facts.extrapolated_law(model, reference_NTV, strength, normalise=flag) for form, flag in FORMS.items()}
        at = {form: gradients(facts.conditionals(model, law_N), strength) for form, law_N in laws.items()}
        here = gradients(model.theta_FV, strength)
        # The token-level gradient of the unnormalised form does not see log Z(prefix): its fixed point is the normalised law.
        fixed = {(c, f): at["unnormalised" if (c, f) == ("to_go", "unnormalised") else "normalised"][c, f] for c, f in here}
        largest = lambda x: float(jnp.max(jnp.abs(x)))
        norms = {
            c: [jnp.linalg.norm(here[c, "normalised"] - here[c, "unnormalised"]), jnp.linalg.norm(here[c, "unnormalised"])] for c, _ in here
        }
        row = {"lambda": strength, "total_variation": float(0.5 * jnp.sum(jnp.abs(laws["normalised"] - laws["unnormalised"])))}
        row["stationary"] = {f"{form}, {credit}": largest(x) for (credit, form), x in fixed.items()}
        row["kept_to_go"] = largest(at["normalised"]["to_go", "unnormalised"])
        rows.append(row | {f"{credit}_difference": float(top / bottom) for credit, (top, bottom) in norms.items()})
    return rows


def breaking(*, instances: int = 200, vocab: int = 3, length: int = 4, seed: int = 0, strengths=STRENGTHS) -> list[dict]:
    """Per case, form and lambda: mean true reward of the fixed point with its interval over instances, the mean gain over lambda = 1, the
    share of instances below it, and of those where one completion has more than half of the mass."""
    rewards, largest = _rewards(instances, vocab, length, seed, strengths)
    one = strengths.index(1.0)
    rows = []
    for c, (case, size) in enumerate(CASES):
        for f, form in enumerate(FORMS):
            for s, strength in enumerate(strengths):
                gain = rewards[:, c, f, s] - rewards[:, c, f, one]
                row = {"case": case, "error": size, "form": form, "lambda": strength}
                row["reward"], row["gain"] = ([float(x) for x in stats.t_interval(values)] for values in (rewards[:, c, f, s], gain))
                row["below_teacher"] = float(np.mean(gain < 0))
                row["one_completion"] = float(np.mean(largest[:, c, f, s] > 0.5))
                rows.append(row)
    return rows


def verdicts(rows: list[dict]) -> list[dict]:
    """Per case and form: the lambda with the highest mean reward and that reward's gain, the lambda from which it breaks, and the one from
    which most fixed points are about a single completion (None: not on the grid)."""
    found = []
    for case, size in CASES:
        for form in FORMS:
            own = [row for row in rows if (row["case"], row["error"], row["form"]) == (case, size, form)]
            best = max(own, key=lambda row: row["reward"][0])
            broken = [row["lambda"] for row in own if row["lambda"] > 1 and row["gain"][2] < 0]
            single = [row["lambda"] for row in own if row["one_completion"] > 0.5]
            verdict = {"case": case, "error": size, "form": form, "best_lambda": best["lambda"], "best_gain": best["gain"]}
            found.append(verdict | {"breaks_from": min(broken, default=None), "one_completion_from": min(single, default=None)})
    return found


def _rewards(instances: int, vocab: int, length: int, seed: int, strengths) -> tuple[np.ndarray, np.ndarray]:
    """(true reward, largest probability of a completion) of the fixed points, [instances, cases, forms, lambdas]."""
    model = enumeration.make("tabular", vocab=vocab, length=length)
    rng = np.random.default_rng(seed)
    shapes = (model.theta_FV.shape, model.theta_FV.shape, model.tokens_NT.shape[:1], model.tokens_NT.shape[:1])
    drawn = [jnp.asarray(rng.normal(size=(instances, *shape))) for shape in shapes]

    def fixed(theta_FV, noise_FV, reward_N, error_N, case, size):
        reference = dataclasses.replace(model, theta_FV=theta_FV)
        logits_NTV = reference.logits(theta_FV)
        believed_N = reward_N + (size * error_N if case == "teacher with errors" else 0)
        taught_N = jax.nn.softmax(reference.log_probability(logits_NTV) + believed_N)
        taught = dataclasses.replace(reference, teacher_logits_NTV=reference.logits(facts.conditionals(reference, taught_N)))
        assumed_NTV = reference.logits(theta_FV + (size * noise_FV if case == "wrong reference" else 0))
        law = lambda strength, flag: facts.extrapolated_law(taught, assumed_NTV, strength, normalise=flag)
        laws_FLN = jnp.stack([jax.vmap(functools.partial(law, flag=flag))(jnp.asarray(strengths)) for flag in FORMS.values()])
        return laws_FLN @ reward_N, jnp.max(laws_FLN, axis=-1)

    def one(*instance):
        cases = [fixed(*instance, case, size) for case, size in CASES]
        return tuple(jnp.stack(x) for x in zip(*cases, strict=True))

    return tuple(np.asarray(x) for x in jax.jit(jax.vmap(one))(*drawn))
