"""Pure maths: arrays in, arrays out. Imports jax alone; no model, mesh, config, data or randomness."""
