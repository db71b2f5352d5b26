"""Jobs of several processes: all come to the same plan, and one of them writes.

Arrays that span processes are reduced and cut by programs that all processes run together. So each
has to ask for the same; what they are about to do is compared before they do it.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from flaxslim import _mesh
from flaxslim._plan import Plan, counted, many
from flaxslim.errors import ProcessError

_BYTES = 96  # of each text that is compared


def agree(leaves: Iterable[Any], **told: str) -> None:
    """Raise `ProcessError` in each process unless all say the same, of arrays that span them.

    Each of them has to come here. Of texts that are long only a digest is compared.
    """
    if jax.process_count() == 1 or not any(map(_mesh.spans_processes, leaves)):
        return
    for what, texts in _all_said({"the releases": _releases(), **told}).items():
        if len({*texts}) > 1:
            raise ProcessError(
                f"the processes of this job do not agree on {what}",
                seen="; ".join(
                    f"{text} in {_numbers(texts, text)}" for text in dict.fromkeys(texts)
                ),
                mend="install the same releases on each host"
                if what == "the releases"
                else "call this in each process with the same arrays, config, spec, width and "
                "multiple_of; a stored plan is to be read from the same file",
            )


def agree_on(plan: Plan, leaves: Iterable[Any]) -> None:
    """Raise `ProcessError` in each process unless all are to cut the same channels."""
    leaves = list(leaves)
    if jax.process_count() > 1 and any(map(_mesh.spans_processes, leaves)):
        digest = hashlib.sha256(plan.to_json().encode()).hexdigest()[:12]
        what = counted((cut.site, cut.removed) for cut in plan.cuts) or "nothing"
        gone = f"{what} at {many(len(plan.cuts), 'sites')} to go"
        agree(leaves, **{"the plan": f"{gone} ({digest})"})


def _releases() -> str:
    from flaxslim import __version__

    return f"flaxslim {__version__}, jax {jax.__version__}, numpy {np.__version__}"


def _numbers(texts: list[str], text: str) -> str:
    own = [str(number) for number, other in enumerate(texts) if other == text]
    return f"process {own[0]}" if len(own) == 1 else f"processes {', '.join(own)}"


def _all_said(told: Mapping[str, str]) -> dict[str, list[str]]:
    """What each process says, by what it is about, in the order of the processes."""
    from jax.experimental import multihost_utils

    own = np.zeros((len(told), _BYTES), np.uint8)
    for row, text in zip(own, told.values(), strict=True):
        data = text.encode()
        if len(data) > _BYTES:
            data = hashlib.sha256(data).hexdigest()[:12].encode()
        row[: len(data)] = np.frombuffer(data, np.uint8)
    said = np.asarray(multihost_utils.process_allgather(own, tiled=False))
    return {
        what: [bytes(row).rstrip(b"\0").decode() for row in said[:, number]]
        for number, what in enumerate(told)
    }


def written_by_one(leaves: Mapping[str, Any], write: Callable[[], Any]) -> Any:
    """What `write` gives in process 0; the others wait until it is done, and give None.

    Raises `ProcessError` for an array that process 0 does not see all of, before anything is
    written, and in the others if process 0 has failed.
    """
    for path, leaf in leaves.items():
        if _mesh.is_apart(leaf):
            raise ProcessError(
                "one process cannot write an array that spans several",
                path=path,
                seen=_mesh.told(leaf),
                mend="save it with Orbax, by which each process writes its own shards: "
                "orbax.checkpoint.StandardCheckpointer().save(path, params)",
            )
    if jax.process_count() == 1:
        return write()
    found, failure = None, None
    if jax.process_index() == 0:
        try:
            found = write()
        except BaseException as error:
            failure = error
    (said,) = _all_said({"": type(failure).__name__ if failure is not None else ""}).values()
    if failure is not None:
        raise failure
    if said[0]:
        raise ProcessError("process 0 could not write the checkpoint", seen=said[0])
    return found
