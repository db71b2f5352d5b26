"""One exception class per mistake; every message says where, what was seen, and what to do.

All of them derive from `FlaxslimError`, so a caller can catch the lot. A message is laid out the
same way each time::

    the second layer of a pair is missing
      at:       bert/encoder/layer/3/output/dense/kernel
      expected: an array of pattern "f d"
      nearest:  bert/encoder/layer/3/output/dense/kernal
      mend:     name the tensor as the spec does, or write a Pair for this layout

Each docstring shows the mistake and the mend (a test runs them). There `params, cfg` is a BERT in
which channels and a head of each layer are dead; `mlp, sizes` is a network `up`, `down` with dead
channels, `MLP` its spec, `forward(params, x)` its function and `x` its input; `alive` are other
parameters of it, without a dead channel.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class FlaxslimError(Exception):
    """Base of all errors that flaxslim raises on purpose.

    Its attributes `problem`, `path`, `seen`, `expected`, `near` and `mend` are the rows of the
    message. Each class is also a built-in error (`ValueError`, `LookupError`, `OSError`, ...).

    Mend: the message's last row.
    """

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


def in_short(error: Exception) -> str:
    """The class and the first line of what somebody else's code raised.

    >>> in_short(ValueError("no such axis" + chr(10) + "see above"))
    'ValueError: no such axis'
    """
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])[:300]


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The `count` candidates that are spelled most like `name`."""
    near = difflib.get_close_matches(name, list(candidates), n=max(count, 1), cutoff=0.3)
    return near[:count]


def neighbours(path: Path, among: Callable[[Path], bool] = Path.exists) -> list[str]:
    """What lies beside a path that is not there, and is spelled most like it."""
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir() if among(p)])
    except OSError:
        return []


# --- find -------------------------------------------------------------------------------------


class AxisPatternError(FlaxslimError, ValueError):
    """An axis pattern is malformed, or an array does not have the shape that it says.

        Pair(first="up", second="down", first_axes="d g")  # wrong
        Pair(first="up", second="down", first_axes="f d", second_axes="d f")  # right

    Mend: name each dimension of the kernel in its order, and the pruned axis in both kernels.
    """


class NothingMatchedError(FlaxslimError, LookupError):
    """A spec found none of its pairs in the tree.

        slim(params, cfg, flaxslim.GPT2_FFN)  # wrong
        slim(params, cfg)  # right

    Mend: leave the spec to the config, or compare the paths of the message with the spec's `at`.
    """


class IncompletePairError(FlaxslimError, LookupError):
    """One layer of a pair is in the tree and the other is not.

        slim(mlp, None, Spec(name="MLP", pairs=Pair(first="up", second="dwon")))  # wrong
        slim(mlp, None, Spec(name="MLP", pairs=Pair(first="up", second="down")))  # right

    Mend: correct the name, or give the tree that has both layers.
    """


class SiteShapeError(FlaxslimError, ValueError):
    """The tensors of one site, or of two sites that share a width, disagree about its size.

        slim({**mlp, "down": {"kernel": np.ones((5, 2))}}, sizes, MLP)  # wrong
        slim(mlp, sizes, MLP)  # right

    Mend: take all tensors from one checkpoint; if they are, its axis patterns are others.
    """


class UnknownFamilyError(FlaxslimError, LookupError):
    """No spec is registered for this `model_type`.

        slim(params, {**cfg, "model_type": "my-bert"})  # wrong
        slim(params, {**cfg, "model_type": "my-bert"}, flaxslim.BERT_FFN)  # right

    Mend: pass a spec: one of ours, your own, or what `discover` finds.
    """


class SpecError(FlaxslimError, TypeError):
    """What was given for `spec`, or for a field of a `Pair`, is none.

        plan(params, cfg, "attention")  # wrong
        plan(params, cfg, "heads", width="per_layer")  # right

    Mend: give a `Spec`, several, or one of "ffn", "heads", "all".
    """


class DiscoveryError(FlaxslimError, ValueError):
    """A function cannot be traced, or nothing in what it computes can be cut exactly.

        discover(lambda params, x: x, mlp, x)  # wrong
        discover(forward, mlp, x)  # right

    Mend: call it as you would call the model; `explain(fn, params, None, *inputs)` says of each
    axis why it stays.
    """


class DiscoveryWarning(UserWarning):
    """Something that `discover` could not tell, and that its user must say or prove.

    A key of the config was taken for a width since it has that value and no other has; a primitive
    has no rule; or a function runs at one width only.

        discover(forward, mlp, x, cfg=sizes)  # wrong
        discover(forward, mlp, x, cfg=sizes, rebuild=shapes)  # right

    Mend: give `rebuild=`, a function of a config that returns the shapes of its parameters; an
    `axis_rule` for the primitive; or prove the cut with `verify`.
    """


class UnsupportedTreeError(FlaxslimError, TypeError):
    """The parameters are in a container that cannot be walked.

        slim(model, cfg)  # wrong
        slim(model.params, model.config)  # right

    Mend: give the pytree of arrays, or an nnx module.
    """


# --- mark -------------------------------------------------------------------------------------


class NonFiniteError(FlaxslimError, ValueError):
    """A tensor of a site holds NaN or infinity, so "contributes nothing" has no meaning.

        slim({**mlp, "up": {"kernel": np.full((3, 6), np.nan)}}, sizes, MLP)  # wrong
        slim(mlp, sizes, MLP)  # right

    Mend: go back to a checkpoint before the training diverged; zero times NaN is NaN.
    """


class UnsupportedDtypeError(FlaxslimError, TypeError):
    """A tensor of a site is not floating point (quantised weights).

        slim(jax.tree.map(np.int8, mlp), sizes, MLP)  # wrong
        small, small_sizes = slim(mlp, sizes, MLP)
        quantised = jax.tree.map(np.int8, small)  # right

    Mend: slim first and quantise then; or cut the quantised copy by the plan of the original,
    `apply(plan, quantised, like=params)`.
    """


class TracedError(FlaxslimError, TypeError):
    """Parameters have no values, on which new shapes depend: tracers, shapes, deleted arrays.

        jax.jit(lambda params: slim(params, sizes, MLP)[0])(mlp)  # wrong
        small, small_sizes = slim(mlp, sizes, MLP)
        jax.jit(forward)(small, x)  # right

    Mend: slim outside of `jit`, `grad` and `vmap`, and compile what runs the result; give what a
    step returned, not what was donated to it.
    """


# --- plan and apply ---------------------------------------------------------------------------


class ConfigError(FlaxslimError, LookupError):
    """The config lacks a key that the spec needs, or contradicts the tensors.

        slim(mlp, {"hidden": 99}, MLP)  # wrong
        slim(mlp, {"hidden": 6}, MLP)  # right

    Mend: give the config that was saved with these parameters.
    """


class WidthError(FlaxslimError, ValueError):
    """The stock class has no config that says the width which is left.

        slim(params, cfg, "heads")  # wrong
        slim(params, cfg, "heads", width="per_layer")  # right

    Mend: pass `width="per_layer"` and load the result by `flaxslim.from_pretrained`.
    """


class LayoutError(FlaxslimError, ValueError):
    """The sizes that a config records cannot be read, or do not fit the tensors or the class.

        plan(params, {**cfg, "flaxslim_layout": {"version": 99, "sites": {}}})  # wrong
        plan(params, cfg)  # right

    Mend: use the config.json that was saved with the parameters, unedited, and a release of
    flaxslim that is not older.
    """


class ShardingError(FlaxslimError, ValueError):
    """The devices of a mesh do not divide what is left of a tensor.

        chosen = plan(host_params, cfg)
        apply(chosen, sharded_params)  # wrong, where the mesh does not divide the widths
        chosen = plan(sharded_params, cfg)
        apply(chosen, sharded_params)  # right

    Mend: make the plan from the arrays where they are, which rounds widths up to what the mesh
    divides, or give a `multiple_of` that it divides.
    """


class ProcessError(FlaxslimError, RuntimeError):
    """The processes of a job disagree, or one of them cannot do alone what is asked of it.

        if jax.process_index() == 0:
            slim(params, cfg)  # wrong: the others wait
        slim(params, cfg)  # right

    Mend: call it in every process, with the same arguments, on the same releases.
    """


class PlanError(FlaxslimError, ValueError):
    """A plan does not belong to this tree, or its JSON is malformed.

        chosen = plan(params, cfg)
        apply(chosen, apply(chosen, params))  # wrong
        apply(plan(params, cfg), params)  # right

    Mend: apply a plan once, to what it was made for; `like=params` for what belongs to that.
    """


class NothingRemovedWarning(UserWarning):
    """No channel is dead, so the model that comes back is the one that went in.

        slim(alive, sizes, MLP)  # wrong
        alive["down"]["kernel"][:3] = 0.0
        slim(alive, sizes, MLP)  # right

    Mend: prune first (make rows of the second layer zero), or give a `threshold`.
    """


class ConfigKeptWarning(UserWarning):
    """What was cut has no key in the config, which goes on to say the old size.

        pair = Pair(first="up", second="down")
        slim(mlp, sizes, Spec(name="MLP", pairs=pair))  # wrong
        pair = Pair(first="up", second="down", width="hidden")
        slim(mlp, sizes, Spec(name="MLP", pairs=pair))  # right

    Mend: name the key in the pair, or give `discover` the config.
    """


class DeadKeptWarning(UserWarning):
    """Some of what is dead was kept, since the config of the stock class can say no less.

        slim(params, cfg, "all")  # wrong
        slim(params, cfg, "all", width="per_layer")  # right

    Mend: pass `width="per_layer"`, or live with what stays: it computes the same.
    """


# --- prove ------------------------------------------------------------------------------------


class ProofError(FlaxslimError, AssertionError):
    """Two models differ by more than rounding, or the inputs cannot tell whether they do.

        small, small_sizes = slim(mlp, sizes, MLP)
        verify(alive, small, forward, inputs=x, spec=MLP).raise_if_failed()  # wrong
        verify(mlp, small, forward, inputs=x, spec=MLP).raise_if_failed()  # right

    Mend: compare with the parameters that were slimmed, on inputs that reach all layers; of a cut
    with a threshold ask only for the difference, `approximate=True`.
    """


class InputsError(FlaxslimError, ValueError):
    """Inputs for the proof cannot be made from the config; they must be given.

        small, small_sizes = slim(mlp, sizes, MLP)
        verify(mlp, small, forward, spec=MLP)  # wrong
        verify(mlp, small, forward, inputs=x, spec=MLP)  # right

    Mend: pass `inputs=`, a dict by keyword, a tuple by position, or the only one.
    """


# --- training ---------------------------------------------------------------------------------


class TrainingError(FlaxslimError, ValueError):
    """A schedule, score or optimizer state that cannot prune.

        flaxslim.cubic(0.0, 0.5, begin=1000, end=500)  # wrong
        flaxslim.cubic(0.0, 0.5, begin=500, end=1000)  # right

    Mend: the message has it; of `update` mostly that parameters are missing,
    `tx.update(grads, state, params)`, or that the state is of another spec.
    """


class TrainingWarning(UserWarning):
    """An optimizer that prunes, and most likely not what was meant.

        idle = {"up": alive["up"], "down": jax.tree.map(np.zeros_like, alive["down"])}
        flaxslim.keep_dead(MLP).init(idle)  # wrong
        flaxslim.keep_dead(MLP).init(mlp)  # right

    Mend: of a second layer that starts at zero take the first steps without `lock`, or name its
    pair in no spec that locks; of a schedule the message has it.
    """


# --- prune without training -------------------------------------------------------------------


class CalibrationError(FlaxslimError, ValueError):
    """Calibration data, a function or statistics from which nothing can be learnt.

        flaxslim.prune(alive, sizes, MLP, model=forward, batches=x, keep=0.5)  # wrong
        flaxslim.prune(alive, sizes, MLP, model=forward, batches=[x], keep=0.5)  # right

    Mend: give a list of batches that `fn(params, batch)` runs on, with finite values.
    """


class BudgetError(FlaxslimError, ValueError):
    """A size or a speed that cannot be reached, or that makes no sense.

        flaxslim.Budget(params="15M", speedup=2.0)  # wrong
        flaxslim.Budget(params="15M")  # right

    Mend: give one limit, above what is left when all that can go is gone; the message says it.
    """


class CalibrationWarning(UserWarning):
    """Calibration data that serves, but is less than what was asked for.

        flaxslim prune dense out --keep 0.7 --calibration few.txt  # wrong: it has 16 lines
        flaxslim prune dense out --keep 0.7 --calibration few.txt --samples 16  # right

    Mend: give more samples or longer ones, or ask for fewer.
    """


# --- checkpoint -------------------------------------------------------------------------------


class CheckpointError(FlaxslimError, OSError):
    """Base of everything that can be wrong with files.

    Mend: the message's last row.
    """


class MissingFileError(CheckpointError):
    """A folder lacks its config, its weights, or a shard of them.

        Path("config.json").write_text("{}")
        flaxslim.load(".")  # wrong
        flaxslim.save("dense", params, cfg)
        flaxslim.load("dense")  # right

    Mend: name the folder that holds config.json and all weight files; download it again.
    """


class CorruptFileError(CheckpointError):
    """A file is truncated or is not what its name says.

        weights = flaxslim.save("dense", params, cfg) / "flax_model.msgpack"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1])
        flaxslim.load("dense")  # wrong
        weights.write_bytes(whole)
        flaxslim.load("dense")  # right

    Mend: copy or download the file again; for a pointer of Git LFS `git lfs pull`.
    """


class UnsafePathError(CheckpointError):
    """An index or a link points outside of the checkpoint's folder.

        config = flaxslim.save("dense", params, cfg) / "config.json"
        config.symlink_to(config.rename("elsewhere.json").resolve())
        flaxslim.load("dense")  # wrong
        Path("elsewhere.json").replace(config)
        flaxslim.load("dense")  # right

    Mend: put the files themselves into the folder; do not trust a repository that does this.
    """


class UnsupportedFormatError(CheckpointError):
    """The weights are in a format that is not read (pickle, or PyTorch without torch).

        flaxslim.save("dense", params, cfg, format="pickle")  # wrong
        flaxslim.save("dense", params, cfg, format="flax-safetensors")  # right

    Mend: convert to safetensors; for `pytorch_model.bin` install torch, which reads it by
    `torch.load(weights_only=True)`.
    """


class TargetError(CheckpointError):
    """The target exists, is read-only, or its disk has no room.

        flaxslim.save("out", params, cfg)
        flaxslim.save("out", params, cfg)  # wrong
        flaxslim.save("out", params, cfg, overwrite=True)  # right

    Mend: name a folder that does not exist, or replace a checkpoint with `overwrite=True`.
    """


class HubError(CheckpointError):
    """The Hub did not give the checkpoint (absent, gated, offline, or connection lost).

        flaxslim.load("org/gated-model")  # wrong: not logged in
        flaxslim.load("org/gated-model", token=token)  # right

    Mend: check the name and the revision, log in, or name a folder on disk.
    """


# --- pictures ---------------------------------------------------------------------------------


class PlotError(FlaxslimError, ValueError):
    """A picture was asked of values that do not hold what it shows, or do not fit one another.

        flaxslim.plot_training([{"step": 1}])  # wrong
        flaxslim.plot_training([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}])  # right

    Mend: pass what the library gives: a `Plan`, the rows of a sweep or of a run, whole.
    """


# --- export -----------------------------------------------------------------------------------


class ExportError(FlaxslimError, ValueError):
    """A model that cannot be traced at the sizes that were asked for, or that it does not take.

        flaxslim export out model.jaxexport --length 4096  # wrong: it has 512 positions
        flaxslim export out model.jaxexport --length 512  # right

    Mend: give numbers that the model takes in place of symbolic sizes, and platforms that it
    knows.
    """


# --- recipes ----------------------------------------------------------------------------------


class RecipeError(FlaxslimError, ValueError):
    """A recipe says what cannot be done; the path is the file and the line that says it.

        flaxslim run digits --set pruning.sparsity=1.5  # wrong
        flaxslim run digits --set pruning.sparsity=0.5  # right

    Mend: correct the line; `--dry-run` shows every key with its value and loads nothing.
    """


class DivergedError(FlaxslimError, ArithmeticError):
    """The loss of a run is NaN or infinite, so nothing that follows would mean anything.

        flaxslim run digits --set train.learning_rate=100.0  # wrong
        flaxslim run digits --set train.learning_rate=0.001  # right

    Mend: lower `train.learning_rate`, raise `train.warmup`, or clip gradients with `train.clip`.
    """
