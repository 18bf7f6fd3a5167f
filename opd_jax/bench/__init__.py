"""How fast a step is beside the machine's limits and other systems: experiments/bench.py; docs/performance.md has what it found."""
