"""Flax's msgpack files: mapped in, streamed out with the bytes that Flax itself would write."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flaxslim._errors import CorruptFileError
from flaxslim.checkpoint._leaf import Leaf, nest


def read_file(path: Path) -> dict[str, Any]:
    """The nested dict of arrays in a msgpack file.

    Raises `CorruptFileError` if the file is truncated or is something else.
    """
    import msgpack
    from flax.serialization import msgpack_restore

    problem, tree = "", None
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:8] == b"version ":
                raise CorruptFileError(
                    "a Git LFS pointer lies where the weights should be",
                    path=str(path),
                    mend="run `git lfs pull` in that folder",
                )
            tree = msgpack_restore(data)  # pyright: ignore[reportArgumentType]
    except CorruptFileError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError, msgpack.UnpackException) as error:
        problem = str(error)
    if not isinstance(tree, dict) or not _is_tree_of_arrays(tree):
        raise CorruptFileError(
            "not a whole msgpack file of Flax parameters",
            path=str(path),
            seen=f"{path.stat().st_size} bytes" + (f" ({problem})" if problem else ""),
            mend="download or copy the file again",
        )
    return tree


def _is_tree_of_arrays(node: Any) -> bool:
    if isinstance(node, dict):
        return all(isinstance(key, str) and _is_tree_of_arrays(node[key]) for key in node)
    return hasattr(node, "shape") and hasattr(node, "dtype")


def write_file(file: BinaryIO, leaves: Mapping[str, Leaf]) -> None:
    """Stream a tree (paths joined by slashes) out, one tensor at a time in memory."""
    import msgpack
    from flax.serialization import msgpack_serialize

    packer: Any = msgpack.Packer()

    def write(node: Any) -> None:
        if isinstance(node, Leaf):
            file.write(msgpack_serialize(node.numpy()))
            return
        file.write(packer.pack_map_header(len(node)))
        for key, child in node.items():
            file.write(packer.pack(key))
            write(child)

    write(nest(leaves, "/"))
