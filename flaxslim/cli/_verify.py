"""`flaxslim verify`: the proof for two checkpoints on disk."""

from flaxslim._prove import Proof
from flaxslim._prove import verify as prove
from flaxslim.checkpoint import Checkpoint, load, read
from flaxslim.checkpoint._folder import RECORD, read_json


def verify(before: str, after: str) -> Proof:
    """Load both as Flax and compare; a cut recorded as approximate is only measured."""
    old, new = read(before), read(after)
    return prove(load(old), load(new), approximate=not _exact(new))


def _exact(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint was cut exactly, by the record beside it; without one it must be."""
    path = checkpoint.folder / RECORD
    return not path.is_file() or bool(read_json(path).get("exact", True))
