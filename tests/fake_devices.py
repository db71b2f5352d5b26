"""Processes of their own, which have several fake devices: eight, if nothing else is said."""

import json
import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping


def environment(devices: int = 8, /, *, flags: str = "", **env: str) -> dict[str, str]:
    """The environment of such a process, which finds the modules that this one finds."""
    here = os.path.dirname(__file__)
    several = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {several} {flags}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here), *sys.path]),
        **env,
    }


def run_code(code: str, devices: int = 8) -> None:
    """Fails with what the code writes to stderr, if it fails."""
    _run([sys.executable, "-c", textwrap.dedent(code)], environment(devices))


def outcomes(script: str, *which: str, flags: str = "", **env: str) -> dict[str, str]:
    """What went wrong in each case of a script that calls `tell`; empty where nothing did."""
    return json.loads(_run([sys.executable, script, *which], environment(flags=flags, **env)))


def _run(command: list[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tell(cases: Mapping[str, Callable[[], None]]) -> None:
    """Run all of them, and print what went wrong in each."""
    found = dict.fromkeys(cases, "")
    for case, run in cases.items():
        try:
            run()
        except Exception:
            found[case] = traceback.format_exc()
    print(json.dumps(found))
