"""What the toy study runs with: what Fu et al. (arXiv 2603.25562, section 2.1 and appendix E) published, and what is ours."""

import dataclasses
import math

from opd_jax.types import UserError

CHUNKS = 20  # training is cut into so many equal pieces, between which students are kept
PUBLISHED = ("gammas", "seeds", "horizon", "batch", "microbatches", "iterations", "starts", "targets")
OPTIMIZERS = ("adam", "sgd")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields of PUBLISHED are those of the paper; all others are unpublished there and chosen here, before any result was seen.

    Also ours, and not a number: tanh between the layers; sigma = min_sigma + softplus(second output); a teacher of its own per task and
    seed, by REINFORCE with Adam on the reward -|position - target| of every step, undiscounted, less the mean return of the batch at that
    step; microbatches of batch / microbatches trajectories; gradients summed over steps and averaged over trajectories.
    """

    gammas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seeds: tuple[int, ...] = (42, 43, 2026)  # each with teachers, initial student and draws of its own
    horizon: int = 20  # steps of a trajectory
    batch: int = 64  # trajectories of an update
    microbatches: int = 8
    iterations: int = 2000  # updates; odd ones on the left task, even ones on the right
    starts: tuple[float, float] = (2.0, -2.0)  # position of the left and of the right task
    targets: tuple[float, float] = (-3.0, 3.0)
    width: int = 60  # of both hidden layers; inferred from "about 4K parameters"
    min_sigma: float = 0.1  # of a Gaussian step, positions
    max_step: float = math.inf  # of its mean, positions; the first output m gives max_step * tanh(m / max_step)
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    teacher_learning_rate: float = 3e-3
    teacher_iterations: int = 1000
    evaluation_batch: int = 1024  # trajectories per task for final positions and heat maps

    def __post_init__(self):
        if self.iterations < CHUNKS or self.iterations % CHUNKS:
            raise UserError(f"iterations = {self.iterations}: must be a multiple of {CHUNKS}, such as {CHUNKS * 10}")
        if self.batch % self.microbatches or self.microbatches < 2:
            raise UserError(f"microbatches = {self.microbatches}: must be at least 2 and divide batch = {self.batch}")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer = {self.optimizer!r} is not known; valid: {', '.join(OPTIMIZERS)}")
        if 0.0 not in self.gammas or 1.0 not in self.gammas:
            raise UserError(f"gammas = {self.gammas}: must hold 0 and 1, the ends that the study compares")
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds = {self.seeds}: must be at least two different numbers, for intervals over seeds")

    def split(self) -> dict[str, dict]:
        """Fields for the output: published, changed (each [here, published]), ours; infinity, which JSON lacks, in words."""
        fields = {name: "unbounded" if value == math.inf else value for name, value in dataclasses.asdict(self).items()}
        published = {name: fields.pop(name) for name in PUBLISHED}
        changed = {
            name: [published.pop(name), own] for name, own in dataclasses.asdict(Settings()).items() if published.get(name, own) != own
        }
        return {"published": published, "changed": changed, "ours": fields}


# Each changes one thing of the defaults, milder or harsher: whether the published drift at gamma = 1 (to a variance of 1e24 in one seed)
# appears may hang on settings that the paper does not give. All are reported; the defaults stay what they are whatever comes out. Three
# gammas are enough to see it.
VARIATION = {"gammas": (0.0, 0.5, 1.0)}
VARIATIONS = {
    "mean steps up to 1": {"max_step": 1.0},
    "sigma from 0.2": {"min_sigma": 0.2},
    "sigma from 0.01": {"min_sigma": 0.01},
    "Adam, 1e-2": {"learning_rate": 1e-2},
    "SGD, 1e-3": {"optimizer": "sgd", "learning_rate": 1e-3},
    "SGD, 1e-5": {"optimizer": "sgd", "learning_rate": 1e-5},
}
QUICK = {"iterations": 200, "teacher_iterations": 400}  # a tenth of the published length: says whether it runs, not what it finds
