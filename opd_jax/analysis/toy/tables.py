"""The toy study's page: settings, what held, and the numbers, as Markdown tables."""

from collections.abc import Iterable, Sequence

import numpy as np

from opd_jax.analysis.summary import estimate
from opd_jax.analysis.toy.results import REACHED, TASKS


def table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(found: dict) -> str:
    """Markdown of what study.run found; its figures lie beside it."""
    parts = [
        *head(found["settings"]),
        "Geometric means over seeds with 95% intervals (Student's t of logarithms; plain where a seed has 0); `diverged` where a seed's "
        "numbers are not finite.",
        "Early and late: medians over the first and the last tenth of the updates. Held: in how many cases of (seed, task).",
    ]
    for name, one in found["gaussian"].items():
        parts += [f"## Gaussian steps, {name}", *_world(one)]
    parts += ["## Chain: steps -1, 0, 1 on 17 places", *_world(found["chain"]), *_exact(found["chain"]["exact"])]
    return "\n\n".join([*parts, *_facts(found["facts"])]) + "\n"


def head(settings: dict) -> list[str]:
    """The title and the settings; a study that is shorter than the published one says so first."""
    changed = settings["changed"]
    here, published = changed.get("iterations", (0, 0))
    quick = here < published
    lines = [f"# {'QUICK: toy' if quick else 'Toy'} study of gradient variance"]
    if quick:
        lines.append(f"**{here} of {published} iterations: this says whether it runs, not what it finds.**")
    lines.append("After Fu et al., Revisiting On-Policy Distillation, arXiv 2603.25562, section 2.1 and appendix E.")
    lines.append(f"Published settings: {_fields(settings['published'])}.")
    if changed:
        lines.append(f"Changed from what is published: {', '.join(f'{name} {a} (there {b})' for name, (a, b) in changed.items())}.")
    return [*lines, f"Not published, chosen here: {_fields(settings['ours'])}; and what `opd_jax/analysis/toy/settings.py` says in words."]


def _fields(fields: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _number(interval: list[float] | None) -> str:
    """`value [low, high]` with three digits that count."""
    if interval is None:
        return "diverged"
    value, low, high = (f"{x:.3g}" for x in interval)
    return f"{value} [{low}, {high}]"


def _distance(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.2g}"


def _world(one: dict) -> list[str]:
    rows = []
    for row in one["gammas"]:
        numbers = [_number(row[name]) for name in ("early_variance", "late_variance", "early_ratio", "late_ratio")]
        # Seeds apart: where some drift and others do not, a mean and its interval say little.
        distances = [" / ".join(_distance(seed[k]) for seed in row["distance_per_seed"]) for k in range(len(TASKS))]
        reached = sum(x is not None and x <= REACHED for seed in row["distance_per_seed"] for x in seed)
        rows.append([f"{row['gamma']:g}", *numbers, *distances, reached, _number(row["reverse_kl"])])
    rows.append(["teachers", "", "", "", "", *(_number(one["teacher_distance"][task]) for task in TASKS), "", ""])
    header = ["gamma", "early variance", "late variance", "early, over gamma 0", "late, over gamma 0"]
    header += [f"distance to the {task} target, by seed" for task in TASKS]
    header += [f"(seed, task) within {REACHED:g}", "sequence KL, nats"]
    told = [[claim["published"], claim["rule"], f"{claim['held']} of {claim['of']}", _verdict(claim)] for claim in one["claims"]]
    claims = table(["published", "counted as held if", "held", "reproduces"], told)
    return [table(header, rows), claims, *(figure(name) for name in one["figures"])]


def figure(name: str) -> str:
    """A figure, and the way to the same without pixels."""
    return f"[![{name.replace('_', ' ')}]({name}.png)]({name}.svg)"


def _verdict(claim: dict) -> str:
    return {claim["of"]: "yes", 0: "no"}.get(claim["held"], "in part")


def _exact(rows: list[dict]) -> list[str]:
    """Geometric means over seeds and tasks."""
    mean = lambda values: f"{10 ** np.mean(np.log10(values)):.3g}"
    lines = []
    for iteration in sorted({row["iteration"] for row in rows}):
        for gamma in sorted({row["gamma"] for row in rows}):
            own = [row for row in rows if (row["iteration"], row["gamma"]) == (iteration, gamma)]
            bias = mean([row["bias"] / row["gradient"] for row in own]) if gamma < 1 else "0"
            cosine = f"{np.mean([row['cosine'] for row in own]):.3f}"
            signal = mean([row["gradient"] ** 2 / row["variance"] for row in own])
            variances = [mean([row[name] for row in own]) for name in ("variance", "output_variance")]
            lines.append([iteration, f"{gamma:g}", bias, cosine, *variances, signal])
    header = ["iteration", "gamma", "bias / gradient", "cosine", "variance, one trajectory", "of the output layer", "gradient^2 / variance"]
    told = "Exact, by dynamic programming, all at the students of gamma = 0; geometric means over seeds and tasks (of cosines the mean):"
    return [told, table(header, lines), figure("chain_exact")]


def _facts(facts: dict) -> list[str]:
    return [
        "## Exact facts, by enumeration",
        "-KL = E[sum log q(y_t) + H(pi_t)]: errors of the value (nats) and, relative, of the gradient by three readings:",
        _entropy(facts["entropy"]),
        "ExOPD, tabular: targets ref^(1-lambda) q^lambda, normalised at each prefix or not. Distance: total variation between the fixed "
        "points of rewards to go; own: largest gradient entry of any form at its own fixed point; other: that of the unnormalised form's "
        "rewards to go at the normalised one; then how far the gradients of both forms differ, relative, at a student that is neither:",
        _fixed_points(facts["fixed_points"]),
        "Where extrapolation breaks (`opd_jax/analysis/toy/extrapolation.py` defines it):",
        _breaks(facts["breaks"]),
        "Off-policy: relative bias and variance of each term under each weight (before: rho_{<t}, through: rho_{<=t}):",
        table(
            ["behaviour", "term", "weight", "bias", "variance"],
            [[r["behaviour"], r["term"], r["weight"], _exactly(r["bias"]), _exactly(r["variance"])] for r in facts["off_policy"]],
        ),
        "`none`, `token` and `sequence` are those of `estimator.importance`. Its `cumulative` is `before` for the local term and `through` "
        "for the token. For rewards to go it is neither: `through` weighs the position, all rewards of token t by rho_{<=t}; `cumulative` "
        "weighs each reward l_u by its own rho_{<=u}, and is unbiased as `sequence` is.",
    ]


def _exactly(value: float) -> str:
    """Two digits; rounding errors stay visible as such."""
    return f"{value:.2g}"


def _entropy(rows: list[dict]) -> str:
    names = ("value", "entropy_differentiated", "sampled_reward", "entropy_as_reward")
    header = ["model", "value", "entropy differentiated", "sampled reward log q - log pi", "entropy as a reward alone"]
    return table(header, [[row["model"], *(_exactly(row[name]) for name in names)] for row in rows])


def _fixed_points(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        numbers = [row["total_variation"], max(row["stationary"].values()), row["kept_to_go"]]
        numbers += [row["token_difference"], row["to_go_difference"]]
        lines.append([row["length"], f"{row['lambda']:g}", *map(_exactly, numbers)])
    return table(["T", "lambda", "distance", "own", "other", "token gradients differ", "to-go gradients differ"], lines)


def _breaks(rows: list[dict]) -> str:
    from_ = lambda x: "not up to 3" if x is None else f"{x:g}"
    lines = []
    for row in rows:
        numbers = [f"{row['best_lambda']:g}", estimate(row["best_gain"]), from_(row["breaks_from"]), from_(row["one_completion_from"])]
        lines.append([row["case"], f"{row['error']:g}", row["form"], *numbers])
    return table(["case", "size of the error", "target", "best lambda", "gain over lambda 1", "breaks from", "one completion from"], lines)
