"""Texts that the first teacher writes before it scores, to be read by the teachers: a critique of an attempt, an analysis of a solution."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel, processes
from opd_jax.config import Config, ConfigError
from opd_jax.data.contexts import Reader
from opd_jax.data.pipeline import Encoder
from opd_jax.data.teacher_prompts import Written
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.model_io import LoadedModel
from opd_jax.models.config import ModelConfig
from opd_jax.models.forward import Model
from opd_jax.rollout import sample

_WRITES = 0x7E87  # its draws are others than those of rollouts


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes for one run; call it under `jax.set_mesh(mesh)`."""

    model: ModelConfig | Model
    encoder: Encoder  # how the teacher reads, with room for what it writes
    tokenizer: Tokenizer
    max_new_tokens: int
    temperature: float  # 0 is greedy
    seed: int
    mesh: Mesh

    def __call__(self, params: dict, texts_B: Sequence[str], id_B: np.ndarray, *, step: int, kind: int) -> Written:
        """What the model writes after each text, without white space around it; a function of seed, step, kind, id and the text."""
        prompts, _ = self.encoder.encode(texts_B, id_B.tolist(), coarse=True)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _WRITES), kind), step)
        law = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "stop_ids": self.tokenizer.eos_ids}
        rollout = sample(params, self.model, parallel.shard_batch(prompts, self.mesh), key=key, **law)
        tokens_BT, mask_BT = processes.to_host((rollout.tokens_BT, rollout.mask_BT))
        texts = [self.tokenizer.decode(tokens[mask].tolist()).strip() for tokens, mask in zip(tokens_BT, mask_BT, strict=True)]
        return Written(texts, int(prompts.mask_BS.sum()), int(mask_BT.sum()))


def from_config(config: Config, teacher: LoadedModel, reader: Reader, tokenizer: Tokenizer, mesh: Mesh) -> Writer:
    """The writer of a run whose first teacher reads by `reader`. Raises ConfigError."""
    asked, context = config.context.privileged, teacher.config.max_position_embeddings
    if asked.write_tokens >= context:
        raise ConfigError(
            f"config field context.privileged.write_tokens = {asked.write_tokens} must be below the teacher's context, {context} tokens"
        )
    # What does not fit is not written: only a question that stands in its row, and whose text is thrown away, is cut.
    encoder = Encoder(reader, context - asked.write_tokens, "truncate")
    return Writer(teacher.config, encoder, tokenizer, asked.write_tokens, asked.write_temperature, config.seed, mesh)
