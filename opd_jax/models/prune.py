"""Smaller students cut out of a teacher."""

import dataclasses

from opd_jax.models.config import ModelConfig
from opd_jax.types import UserError


def keep_layers(params: dict, config: ModelConfig, keep: tuple[int, ...]) -> tuple[dict, ModelConfig]:
    """The model with the layers `keep` alone, in order and renumbered from 0; everything else is shared with `params`, not copied.

    A layer keeps its kind (sliding window, mixture of experts). Raises UserError unless `keep` is a rising sequence of layers that exist.
    """
    rising = all(a < b for a, b in zip(keep, keep[1:], strict=False))
    if not keep or not rising or keep[0] < 0 or keep[-1] >= config.num_layers:
        raise UserError(f"keep = {','.join(map(str, keep))!r}: must be rising layer numbers out of 0..{config.num_layers - 1}, such as 0,1")
    layers = {str(new): params["layers"][str(old)] for new, old in enumerate(keep)}
    return params | {"layers": layers}, dataclasses.replace(config, num_layers=len(keep), layers=tuple(config.layers[i] for i in keep))
