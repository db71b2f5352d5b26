"""Shared settings: the real data where it is at hand, and the table of families."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile

# Before jax is imported anywhere: tests run on CPU, whatever the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling programs that run once: a third less of it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Each operation of a program would say from which lines it came: a tenth of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if importlib.metadata.version("jaxlib").startswith(("0.6.", "0.7.", "0.8.", "0.9.", "0.10.")):
    # Later ones end the process for a flag that they do not know.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest

# Traces are full of objects that live on; to look through them all the time takes a tenth of it.
gc.set_threshold(50_000, 20, 50)

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config) -> None:
    """Many programs are the same in several files: the workers share what was compiled."""
    import jax
    from initialised import initialised_by_numpy

    initialised_by_numpy()
    if importlib.util.find_spec("transformers") is None:
        import without_transformers

        config.pluginmanager.register(without_transformers)
    if not hasattr(config, "workerinput"):  # a worker has the environment of the main process
        cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        config.add_cleanup(cache.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        jax.config.update("jax_compilation_cache_dir", cache.name)


def pytest_collection_finish() -> None:
    """What was imported by now stays, so that no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem) -> None:
    """What was compiled for one file is of no use to the next, and fills gigabytes."""
    if nextitem is not None and nextitem.path != item.path:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The folder of real checkpoints beside the project; tests that need it skip without."""
    if not DATA.is_dir():
        pytest.skip(f"no real checkpoints at {DATA}")
    return DATA


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of families: what `record_property("family", ...)` left in the reports."""
    rows = sorted(
        value
        for report in terminalreporter.stats.get("passed", ())
        for name, value in getattr(report, "user_properties", ())
        if name == "family"
    )
    if not rows:
        return
    rows = [("family", "class", "width", "difference", "control"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    terminalreporter.section("families: zeroed against slimmed, relative to the largest output")
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
