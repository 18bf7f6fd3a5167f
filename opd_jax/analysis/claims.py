"""The table of claims: what the registry says of itself, as Markdown for the README."""

from opd_jax.numerics.estimators import REGISTRY
from opd_jax.types import UserError

BEGIN, END = "<!-- claims: written by experiments/claims.py -->", "<!-- end of claims -->"


def table() -> str:
    """One row per registered estimator: name, formula, claim, source. Pipes in formulas are escaped."""
    rows = ["| name | estimate | claim | source |", "|---|---|---|---|"]
    for estimator in REGISTRY.values():
        cells = (f"`{estimator.name}`", f"`{estimator.formula}`", estimator.claim, estimator.reference)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def insert(text: str, *, where: str) -> str:
    """`text` with the table between its two marks. Raises UserError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{where}: the marks {BEGIN!r} and {END!r} are not there; put them where the table belongs")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
