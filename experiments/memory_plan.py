"""Tells what a run needs of each device's memory, before anything is loaded, on this machine or on a mesh that it does not have.

python experiments/memory_plan.py --config=CONFIG[:arg] [--config.mesh.fsdp=8 ...] [--devices=N] [--compile]

Models may be folders with nothing but a config.json, or published shapes by name, which needs no file:
--config.student.path=qwen3-1.7b --config.teacher.path=qwen3-32b. Lengths are the config's: rollout.max_prompt_length is the prompt.

--compile also compiles the programs for so many virtual CPU devices, which proves that the shardings work, and prints what XLA says that
they need there. It takes minutes for large models. XLA makes other programs for GPU and TPU: on a CPU bfloat16 is gathered and multiplied
as float32, so that temporaries of large models are up to twice as large.
"""

import os
import time

import _checkout  # noqa: F401
import jax
from absl import flags
from ml_collections import config_flags

from opd_jax import aot, cli, config, memory_plan, outlines, parallel
from opd_jax.types import UserError

# The order of instructions that needs the least memory, not the one that keeps cores busy; no passes that change machine code alone.
FOR_MEMORY = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arg]; --config.a.b=value changes a field.", lock_config=True)
DEVICES = flags.DEFINE_integer("devices", None, "Devices of the mesh, as a check; without it, as many as the mesh has.")
COMPILE = flags.DEFINE_bool("compile", False, "Compile the programs of a run, too.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> None:
    parsed = config.parse(CONFIG.value)
    asked = parsed.mesh
    devices = asked.devices
    if DEVICES.value not in (None, devices):
        sizes = " * ".join(f"mesh.{axis}" for axis in parallel.AXES)
        given = " * ".join(str(getattr(asked, axis)) for axis in parallel.AXES)
        if asked.teacher:
            sizes, given = f"{sizes} + mesh.teacher", f"{given} + {asked.teacher}"
        raise UserError(f"--devices={DEVICES.value}: {sizes} = {given} = {devices}; make it {DEVICES.value}, or leave the flag out")
    if COMPILE.value:  # before jax looks for devices
        if parsed.rollout.source != "student" or parsed.rollout.aggregate:
            raise UserError(f"--compile: knows the programs of rollout.source = 'student', not {parsed.rollout.source!r} or an aggregate")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FOR_MEMORY}"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    models = outlines.of_config(parsed)
    plan = memory_plan.plan(parsed, memory_plan.abstract_mesh(asked.data, asked.fsdp, asked.tensor, asked.sequence), models)
    print(memory_plan.table(plan))
    if COMPILE.value:
        compile_programs(parsed, models)


def compile_programs(parsed: config.Config, models: outlines.Outlines) -> None:
    """Prints what XLA says of each program, on the devices there are."""
    mesh = parallel.from_settings(parsed.mesh)
    print("\nXLA on virtual CPU devices, bytes on each:")
    for name, program in aot.PROGRAMS.items():
        begin = time.perf_counter()
        found = program(parsed, models, mesh).memory_analysis()
        sizes = {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes, "results": found.output_size_in_bytes}
        told = ", ".join(f"{what} {memory_plan.size(count)}" for what, count in sizes.items())
        print(f"{name:10} {told} (compiled in {time.perf_counter() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    cli.run(main)
