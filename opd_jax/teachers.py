"""The teacher: the rows of its vocabulary that count."""

import dataclasses

from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.model_io import LoadedModel
from opd_jax.types import UserError


def mask_padding(model: LoadedModel, tokenizer: tokenizer_lib.Tokenizer, *, field: str) -> LoadedModel:
    """Masks the rows of a vocabulary that the tokenizer does not use (Qwen2.5 has 151,936 or 152,064 rows for the same ids)."""
    rows, ids = model.config.vocab_size, tokenizer.vocab_size
    if ids > rows:
        raise UserError(
            f"{field}: the model has {rows} vocabulary rows, its tokenizer {ids} ids; give a model and tokenizer that belong together"
        )
    return dataclasses.replace(model, config=dataclasses.replace(model.config, valid_vocab_size=ids))
