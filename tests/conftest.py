"""Eight virtual CPU devices, no silent rank promotion, and the fixtures that several files share."""

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # the scripts keep nothing, and find nothing that another version has kept
# Most of the suite is compilation of programs that run once: the compiler's expensive passes would take a third of the time. Programs are
# the same but for rounding. `XLA_FLAGS= make test` compiles as users do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real models and data, kept beside the checkout and never copied into it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED.parent.name}/{SHARED.name} beside the checkout")
    return SHARED


@pytest.fixture
def float64():
    """Runs one test in float64, for exact enumeration."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each file's programs are its own; kept, they would fill gigabytes over the suite."""
    yield
    jax.clear_caches()
