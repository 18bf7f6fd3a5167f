"""Where the toy student walks: Gaussian steps on the line, as Fu et al. have it, and its discrete counterpart, three steps on 17 places.

A world turns outputs of the network [..., outputs] into a law of actions, and an action into the next position.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

LIMIT = 8  # the chain's places are -LIMIT to LIMIT
DRIFT = 64  # heat maps of Gaussian steps show positions from -DRIFT to DRIFT: students of gamma = 1 went as far as 56


class World(abc.ABC):
    """Laws are in nats; all methods are elementwise over leading axes."""

    outputs: int
    edges: np.ndarray  # of the bins of a heat map

    @abc.abstractmethod
    def noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What `act` needs beside the outputs for `shape` draws."""

    @abc.abstractmethod
    def act(self, outputs: jax.Array, noise: jax.Array) -> jax.Array:
        """The action, a function of the noise."""

    @abc.abstractmethod
    def log_prob(self, outputs: jax.Array, action: jax.Array) -> jax.Array:
        """log pi(action)."""

    @abc.abstractmethod
    def kl(self, outputs: jax.Array, target: jax.Array) -> jax.Array:
        """KL between the laws of two outputs."""

    @abc.abstractmethod
    def move(self, position: jax.Array, action: jax.Array) -> jax.Array:
        """The next position."""


@dataclasses.dataclass(frozen=True)
class Gaussian(World):
    """Steps delta ~ N(mu, sigma); outputs are mu (through tanh, where it has a bound) and, through min_sigma + softplus, sigma."""

    min_sigma: float
    max_step: float = math.inf

    outputs = 2
    edges = np.linspace(-DRIFT, DRIFT, 4 * DRIFT + 1)

    def parameters(self, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = outputs[..., 0] if self.max_step == math.inf else self.max_step * jnp.tanh(outputs[..., 0] / self.max_step)
        return mean, self.min_sigma + jax.nn.softplus(outputs[..., 1])

    def noise(self, key, shape):
        return jax.random.normal(key, shape)

    def act(self, outputs, noise):
        mean, sigma = self.parameters(outputs)
        return mean + sigma * noise

    def log_prob(self, outputs, action):
        mean, sigma = self.parameters(outputs)
        return -0.5 * jnp.square((action - mean) / sigma) - jnp.log(sigma) - 0.5 * jnp.log(2 * jnp.pi)

    def kl(self, outputs, target):
        (mean, sigma), (target_mean, target_sigma) = self.parameters(outputs), self.parameters(target)
        ratio = sigma / target_sigma
        return 0.5 * (jnp.square(ratio) - 1 + jnp.square((mean - target_mean) / target_sigma)) - jnp.log(ratio)

    def move(self, position, action):
        return position + action


@dataclasses.dataclass(frozen=True)
class Chain(World):
    """Steps -1, 0, 1 on the places -LIMIT to LIMIT, whose ends hold back what would leave; outputs are logits."""

    outputs = 3
    edges = np.arange(-LIMIT, LIMIT + 2) - 0.5

    def noise(self, key, shape):
        return jax.random.gumbel(key, (*shape, self.outputs))

    def act(self, outputs, noise):
        return jnp.argmax(outputs + noise, axis=-1) - 1

    def log_prob(self, outputs, action):
        return jnp.take_along_axis(jax.nn.log_softmax(outputs), (action + 1)[..., None], axis=-1)[..., 0]

    def kl(self, outputs, target):
        logp, logq = jax.nn.log_softmax(outputs), jax.nn.log_softmax(target)
        return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

    def move(self, position, action):
        return jnp.clip(position + action, -LIMIT, LIMIT)
