"""Cases that are run in a process of their own, which has eight fake devices."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping


def outcomes(script: str, *which: str, flags: str = "", **env: str) -> dict[str, str]:
    """What went wrong in each case of a script that calls `tell`; empty where nothing did."""
    here = os.path.dirname(__file__)
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here), *sys.path]),
        **env,
    }
    command = [sys.executable, script, *which]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tell(cases: Mapping[str, Callable[[], None]]) -> None:
    """Run all of them, and print what went wrong in each."""
    found = dict.fromkeys(cases, "")
    for case, run in cases.items():
        try:
            run()
        except Exception:
            found[case] = traceback.format_exc()
    print(json.dumps(found))
