"""Ratios that are kept from run to run: shares of the machine's floor, and peers' times over ours. Larger is better.

Seconds would say as much about a machine as about the code; ratios of what is measured in one run say less about the machine.
"""

import json
import pathlib
from typing import Any

from opd_jax import files
from opd_jax.bench.processes import PEERS
from opd_jax.bench.table import Ratio, Row
from opd_jax.types import UserError

TOLERANCE = 0.25  # a ratio may fall below the kept one by this share: runs on two shared cores differ by as much
KEPT = ("prefill", "decode", "teacher", "gradient", "optimizer", "step")


def figures(rows: list[Row], ratios: list[Ratio]) -> dict[str, float]:
    """The ratios of a run by name, such as floor/decode/float32 and trl/step/float32."""
    shares = {f"floor/{row.phase}/{row.dtype}": row.floor_share for row in rows if row.phase in KEPT}
    return shares | {f"{one.peer}/{one.phase}/{one.dtype}": one.ratio for one in ratios if one.peer in PEERS}


def read(path: pathlib.Path, key: str) -> dict[str, Any] | None:
    """What is kept for a shape on a platform: {"tolerance": share, "ratios": {name: ratio}}; None: nothing. Raises UserError."""
    if not path.exists():
        return None
    kept = files.read_json(path, remedy="restore it, or give another --baseline").get(key)
    if kept is None:
        return None
    good = isinstance(kept, dict) and isinstance(kept.get("ratios"), dict) and isinstance(kept.get("tolerance"), float)
    if not good or not all(isinstance(value, int | float) for value in kept["ratios"].values()):
        raise UserError(f"{path}: {key} must have a tolerance and ratios, which are numbers; restore it, or give --update_baseline")
    return kept


def write(path: pathlib.Path, key: str, found: dict[str, float]) -> None:
    """Keeps the ratios of a run; those that it has not measured, and those of other shapes, stay. Raises UserError."""
    kept = files.read_json(path, remedy="delete it") if path.exists() else {}
    before = kept.get(key, {}).get("ratios", {})
    ratios = before | {name: round(value, 3) for name, value in found.items()}
    kept[key] = {"tolerance": kept.get(key, {}).get("tolerance", TOLERANCE), "ratios": dict(sorted(ratios.items()))}
    try:
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--baseline={path}: cannot be written ({error.strerror}); give another file") from None


def worse(found: dict[str, float], kept: dict[str, Any]) -> list[str]:
    """A line for each ratio that fell below the kept one by more than the tolerance. What was not measured is not compared."""
    lines = []
    for name, before in kept["ratios"].items():
        now = found.get(name)
        if now is not None and now < before * (1 - kept["tolerance"]):
            lines.append(f"{name} fell from {before:.3f} to {now:.3f}, by more than {kept['tolerance']:.0%}")
    return lines
