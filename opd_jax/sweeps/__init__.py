"""Sweeps: many runs of one config that differ in a few fields and in their seed, and the table of what came out.

For config files: the combinators. The rest is called by experiments/sweep.py: plan.py (points -> checked runs), pool.py and slots.py
(processes within a budget), status.py (what is done), board.py (the live table), table.py (statistics), sweep.py (all of it in order).
"""

from opd_jax.sweeps.combinators import REPLICATES as REPLICATES
from opd_jax.sweeps.combinators import Point as Point
from opd_jax.sweeps.combinators import Sweep as Sweep
from opd_jax.sweeps.combinators import chain as chain
from opd_jax.sweeps.combinators import over as over
from opd_jax.sweeps.combinators import product as product
from opd_jax.sweeps.combinators import seeds as seeds
from opd_jax.sweeps.combinators import zip as zip
