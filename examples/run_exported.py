"""What runs a file of `flaxslim export`: jax, safetensors and flatbuffers; no more.

flaxslim export path/to/folder model.jaxexport
python examples/run_exported.py model.jaxexport
"""

import sys
from functools import partial

import jax
from jax import export
from safetensors import safe_open


def load(path):
    """The programs of a file by their sizes: functions of a dict of arrays."""
    with safe_open(path, framework="np") as file:
        params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = file.metadata()["programs"].split()
    programs = {name: export.deserialize(bytearray(params.pop(name))) for name in names}
    params = jax.device_put(params)
    return {name: partial(jax.jit(program.call), params) for name, program in programs.items()}


def main() -> None:
    with safe_open(sys.argv[1], framework="np") as file:
        said = file.metadata()
    print(f"{said['model']} for {said['platforms']}: {said['inputs']} -> {said['outputs']}")
    for name in load(sys.argv[1]):
        print(f"load({sys.argv[1]!r})[{name!r}]({{...}})")


if __name__ == "__main__":
    main()
