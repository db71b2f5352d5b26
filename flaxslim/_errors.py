"""One exception class per mistake; every message says where, what was seen, and what to do.

All of them derive from `FlaxslimError`, so a caller can catch the lot. A message is laid out the
same way each time::

    the second layer of a pair is missing
      at:       bert/encoder/layer/3/output/dense/kernel
      expected: an array of pattern "f d"
      nearest:  bert/encoder/layer/3/output/dense/kernal
      mend:     name the tensor as the spec does, or write a Pair for this layout
"""

import difflib
from collections.abc import Iterable, Sequence


class FlaxslimError(Exception):
    """Base of all errors that flaxslim raises on purpose."""

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        seen: object = None,
        expected: object = None,
        near: Sequence[str] = (),
        mend: str | None = None,
    ):
        self.problem, self.path, self.seen, self.expected = problem, path, seen, expected
        self.near, self.mend = tuple(near), mend
        rows = (
            ("at", path),
            ("found", seen),
            ("expected", expected),
            ("nearest", ", ".join(self.near) or None),
            ("mend", mend),
        )
        lines = [f"  {name + ':':<9} {value}" for name, value in rows if value is not None]
        super().__init__("\n".join([problem, *lines]))


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The `count` candidates that are spelled most like `name`."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.3)


# --- find -------------------------------------------------------------------------------------


class AxisPatternError(FlaxslimError, ValueError):
    """An axis pattern is malformed, or an array does not have the shape that it says."""


class NothingMatchedError(FlaxslimError, LookupError):
    """A spec found none of its pairs in the tree."""


class IncompletePairError(FlaxslimError, LookupError):
    """One layer of a pair is in the tree and the other is not."""


class SiteShapeError(FlaxslimError, ValueError):
    """The tensors of one site, or of two sites that share a width, disagree about its size."""


class UnknownFamilyError(FlaxslimError, LookupError):
    """No spec is registered for this `model_type`."""


class SpecError(FlaxslimError, TypeError):
    """What was given for `spec`, or for a field of a `Pair`, is none."""


class DiscoveryError(FlaxslimError, ValueError):
    """A function cannot be traced, or nothing in what it computes can be cut exactly."""


class DiscoveryWarning(UserWarning):
    """Something that `discover` could not tell, and that its user must say or prove."""


class UnsupportedTreeError(FlaxslimError, TypeError):
    """The parameters are in a container that cannot be walked."""


# --- mark -------------------------------------------------------------------------------------


class NonFiniteError(FlaxslimError, ValueError):
    """A tensor of a site holds NaN or infinity, so "contributes nothing" has no meaning."""


class UnsupportedDtypeError(FlaxslimError, TypeError):
    """A tensor of a site is not floating point (quantised weights)."""


class TracedError(FlaxslimError, TypeError):
    """Parameters are tracers: new shapes depend on values, which `jax.jit` does not know."""


# --- plan and apply ---------------------------------------------------------------------------


class ConfigError(FlaxslimError, LookupError):
    """The config lacks a key that the spec needs, or contradicts the tensors."""


class WidthError(FlaxslimError, ValueError):
    """The stock class has no config that says the width which is left."""


class LayoutError(FlaxslimError, ValueError):
    """The sizes that a config records cannot be read, or do not fit the tensors or the class."""


class ShardingError(FlaxslimError, ValueError):
    """The devices of a mesh do not divide what is left of a tensor."""


class ProcessError(FlaxslimError, RuntimeError):
    """The processes of a job disagree, or one of them cannot do alone what is asked of it."""


class PlanError(FlaxslimError, ValueError):
    """A plan does not belong to this tree, or its JSON is malformed."""


class NothingRemovedWarning(UserWarning):
    """No channel is dead, so the model that comes back is the one that went in."""


class ConfigKeptWarning(UserWarning):
    """What was cut has no key in the config, which goes on to say the old width."""


class DeadKeptWarning(UserWarning):
    """Some of what is dead was kept, since the config of the stock class can say no less."""


# --- prove ------------------------------------------------------------------------------------


class ProofError(FlaxslimError, AssertionError):
    """Two models differ by more than rounding, or the inputs cannot tell whether they do."""


class InputsError(FlaxslimError, ValueError):
    """Inputs for the proof cannot be made from the config; they must be given."""


# --- training ---------------------------------------------------------------------------------


class TrainingError(FlaxslimError, ValueError):
    """A schedule, score or optimizer state that cannot prune."""


# --- prune without training -------------------------------------------------------------------


class CalibrationError(FlaxslimError, ValueError):
    """Calibration data, a function or statistics from which nothing can be learnt."""


class BudgetError(FlaxslimError, ValueError):
    """A size or a speed that cannot be reached, or that makes no sense."""


class CalibrationWarning(UserWarning):
    """Calibration data that serves, but is less than what was asked for."""


# --- checkpoint -------------------------------------------------------------------------------


class CheckpointError(FlaxslimError, OSError):
    """Base of everything that can be wrong with files."""


class MissingFileError(CheckpointError):
    """A folder lacks its config, its weights, or a shard of them."""


class CorruptFileError(CheckpointError):
    """A file is truncated or is not what its name says."""


class UnsafePathError(CheckpointError):
    """An index or a link points outside of the checkpoint's folder."""


class UnsupportedFormatError(CheckpointError):
    """The weights are in a format that is not read (pickle, or PyTorch without torch)."""


class TargetError(CheckpointError):
    """The target exists, is read-only, or its disk has no room."""


class HubError(CheckpointError):
    """The Hub did not give the checkpoint (absent, gated, offline, or connection lost)."""


# --- export -----------------------------------------------------------------------------------


class ExportError(FlaxslimError, ValueError):
    """A model that cannot be traced at the sizes that were asked for, or that it does not take."""


# --- recipes ----------------------------------------------------------------------------------


class RecipeError(FlaxslimError, ValueError):
    """A recipe says what cannot be done; the path is the file and the line that says it."""


class DivergedError(FlaxslimError, ArithmeticError):
    """The loss of a run is NaN or infinite, so nothing that follows would mean anything."""
