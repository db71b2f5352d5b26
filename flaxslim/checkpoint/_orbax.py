"""Orbax checkpoints: a dense one to a slimmed one, tensor by tensor, and the shapes to restore it.

Orbax reads the metadata and writes the new checkpoint, whole or not at all, in the format of the
old one. In between, each tensor is a `Lazy` one: it is read, cut and written a chunk at a time (a
chunk is what one device held when the checkpoint was saved; all of it on a single device). Before,
each kernel is read once for where it is zero. So the memory is that of a few chunks.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxslim._apply import apply, resized
from flaxslim._draw import plan
from flaxslim._lazy import Lazy
from flaxslim._plan import Plan
from flaxslim._slim import mend_blocked
from flaxslim._spec import SpecLike
from flaxslim._tree import flatten, name_of, replace
from flaxslim.checkpoint._chunks import Stored, chunk_of, outline, region_of, regions
from flaxslim.checkpoint._orbax_read import StoredTree, address, read_orbax
from flaxslim.checkpoint._yaml import rewritten, values_of
from flaxslim.errors import (
    FlaxslimError,
    MissingFileError,
    TargetError,
    WidthError,
)
from flaxslim.specs import chosen as chosen_spec


def convert_orbax(
    source: str | os.PathLike,
    target: str | os.PathLike,
    spec: SpecLike = None,
    cfg: Any = None,
    *,
    width: str = "uniform",
    multiple_of: int | Mapping[str, int] = 1,
    threshold: float = 0.0,
    params: str | None = None,
) -> tuple[Plan, Any]:
    """Write an Orbax checkpoint without the dead channels of another; the plan and the new config.

    Args:
      source: a checkpoint of a `StandardCheckpointer` or `PyTreeCheckpointer`, the item of a step
        (`.../100/default`), or a step with one item; local, or an address that Orbax reads
        (`gs://...`).
      target: the new one, which must not exist. Orbax restores it as it restores the source.
      spec: such as `MAXTEXT_FFN`; by default that of the config's `model_type`.
      cfg: the config that goes with the parameters, as for `slim`; or a YAML file, of which a copy
        with the new widths is written beside the target (`items.yml`), comments and all.
      width, multiple_of, threshold: as for `plan`.
      params: where in the tree the parameters are ("model/params"); by default "params", if that
        stands beside other things, else all of it. What was made for them, an optimizer state, is
        cut along.

    Nothing is written if the plan removes nothing. The new metadata keep the old one's, and say
    what was cut. Raises `MissingFileError`, `UnsupportedFormatError`, `TargetError`, and what
    `plan` and `apply` raise.

    >>> convert_orbax("dense/0/items", "slim/0/items", MAXTEXT_FFN, "cfg.yml")  # doctest: +SKIP
    """
    place = address(target)
    if place.exists():
        raise TargetError("the target exists", path=str(place), mend="name another folder")
    text = _text(cfg)
    values = cfg if text is None else values_of(text, str(cfg))
    stored = read_orbax(source)
    tree = _whole(stored.tree, params, str(stored.folder))
    judged = tree.params if threshold else _outlined(tree.params, values, spec)
    chosen = plan(judged, values, spec, width=width, multiple_of=multiple_of, threshold=threshold)
    if not chosen.removed:
        if chosen.blocked:
            raise WidthError("; ".join(chosen.blocked), mend=mend_blocked(chosen))
        return chosen, values
    new_values = resized(chosen, values) if values is not None else None
    beside = {}
    if text is not None:
        copy = place.parent / f"{place.name}{address(cfg).suffix}"
        check_free(copy)
        beside[copy] = rewritten(text, dict(values or {}), dict(new_values or {}), str(cfg))
    _write(place, tree.cut(chosen), stored, chosen, beside)
    return chosen, new_values


def check_free(config: Any) -> None:
    """Raise `TargetError` if something lies where the new config is to be written."""
    if config.exists():
        raise TargetError(
            "the place of the new config is taken",
            path=str(config),
            mend="name another target, or move that file: the config is written beside it",
        )


def _outlined(params: Any, cfg: Any, spec: SpecLike) -> Any:
    """The parameters with outlines for kernels, by which the exact rules find the same channels."""
    leaves, new = flatten(params), {}
    sites, _ = chosen_spec(spec, cfg).bind(params, cfg)
    times = Counter(tensor.path for site in sites for tensor in site.cut)
    for site in sites:
        keep = {site.pair.axis, site.pair.group, *site.second.axes.stack}
        for tensor in (*site.first, *site.also, *site.reading):
            leaf = leaves[tensor.path]
            # What two sites share, or adapters add to, is judged by its values.
            if isinstance(leaf, Stored) and times[tensor.path] == 1 and not site.lora:
                new[tensor.path] = outline(leaf, tensor, {*tensor.axes.names} - keep)
    return replace(params, new)


def orbax_abstract(
    source: str | os.PathLike,
    plan: Plan | None = None,
    *,
    sharding: Any = None,
    params: str | None = None,
) -> Any:
    """What a checkpoint holds as `jax.ShapeDtypeStruct`s, by which Orbax restores it in shards.

    Args:
      source: as for `convert_orbax`; only its metadata are read.
      plan: the shapes after this cut, for a checkpoint that is about to be slimmed.
      sharding: a `jax.sharding.Sharding` for all arrays, or a function of (path, shape) that gives
        one.
      params: as for `convert_orbax`, with a plan.

    Raises `MissingFileError`, `UnsupportedFormatError`, and `PlanError` for another tree's plan.

    >>> abstract = orbax_abstract("slim/0/items", sharding=rule)  # doctest: +SKIP
    >>> StandardCheckpointer().restore("slim/0/items", abstract)  # doctest: +SKIP
    """
    stored = read_orbax(source)
    tree = stored.tree
    if plan is not None:
        tree = _whole(tree, params, str(stored.folder)).cut(plan, fold=False)  # shapes alone

    def struct(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Lazy):
            return leaf
        own = sharding(name_of(path), leaf.shape) if callable(sharding) else sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    return jax.tree_util.tree_map_with_path(struct, tree)


def _text(cfg: Any) -> str | None:
    """The text of a config that is given as a file."""
    if not isinstance(cfg, str | os.PathLike):
        return None
    path = address(cfg)
    if not path.exists():
        raise MissingFileError("there is no such file", path=str(path))
    return path.read_text()


# --- which part of it is the parameters -------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Whole:
    """A tree, and where in it the parameters are."""

    tree: Any
    keys: tuple[str, ...]

    @property
    def params(self) -> Any:
        part = self.tree
        for key in self.keys:
            part = part[key]
        return part

    def cut(self, plan: Plan, *, fold: bool = True) -> Any:
        """The tree by a plan for the parameters, and with it all that was made for them."""

        def beside(part: Any) -> Any:
            arrays = any(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(part))
            if not arrays or not isinstance(part, dict | list | tuple):
                return part
            return apply(plan, part, fold=fold, like=self.params)

        def at(part: Any, keys: tuple[str, ...]) -> Any:
            if not keys:
                return apply(plan, part, fold=fold)
            return {
                key: at(value, keys[1:]) if key == keys[0] else beside(value)
                for key, value in part.items()
            }

        return at(self.tree, self.keys)


def _whole(tree: Any, params: str | None, folder: str) -> _Whole:
    if params is None:
        # Alone, it is the name of Linen's collection, which belongs to the paths of a plan.
        among = isinstance(tree, Mapping) and "params" in tree and len(tree) > 1
        keys = ("params",) if among else ()
        return _Whole(tree=tree, keys=keys)
    part, keys = tree, tuple(params.split("/"))
    for key in keys:
        if not isinstance(part, Mapping) or key not in part:
            raise MissingFileError(
                "the checkpoint has no parameters there",
                path=f"{folder}: {params}",
                seen=", ".join(part) if isinstance(part, Mapping) else type(part).__name__,
            )
        part = part[key]
    return _Whole(tree=tree, keys=keys)


# --- writing ----------------------------------------------------------------------------------


def _write(
    target: Any, tree: Any, stored: StoredTree, chosen: Plan, beside: Mapping[Any, str]
) -> None:
    """By Orbax, which gives each lazy leaf to a handler of ours; texts go before, by their paths.

    Orbax gives the checkpoint its name when it is whole. If that fails, nothing is left.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=stored.ocdbt, use_zarr3=stored.zarr3, type_handler_registry=_handlers()
    )
    custom = {**(stored.custom or {}), "flaxslim": _said(chosen)}
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        for path, text in beside.items():
            path.write_text(text)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(target, args=ocp.args.PyTreeSave(tree, custom_metadata=custom))
    except BaseException as error:
        for path in beside:
            path.unlink(missing_ok=True)
        for partial in target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*"):
            partial.rmtree()
        if isinstance(error, OSError) and not isinstance(error, FlaxslimError):
            raise TargetError(
                "the checkpoint could not be written; nothing was kept",
                path=str(target),
                seen=error.strerror or error,
            ) from error
        raise


def _handlers() -> Any:
    """Orbax's registry of who writes what; a lazy leaf is read, cut and written chunk by chunk."""
    import orbax.checkpoint as ocp
    import tensorstore

    class LazyHandler(ocp.type_handlers.NumpyHandler):
        """Writes lazy leaves as what they are later restored as: arrays."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                chunk = chunk_of(value)
                spec = ocp.type_handlers.get_json_tspec_write(
                    info,
                    use_ocdbt=info.is_ocdbt_checkpoint,
                    global_shape=value.shape,
                    local_shape=chunk,
                    dtype=value.dtype,
                    process_index=0 if info.is_ocdbt_checkpoint else None,
                )
                store = await tensorstore.open(
                    tensorstore.Spec(spec), create=True, open=True, context=info.ts_context
                )
                writing = None  # while the next chunk is read and cut
                for region in regions(value.shape, chunk):
                    values = region_of(value, region)
                    if writing is not None:
                        await writing
                    writing = store[region].write(values)
                    writing.commit.force()
                if writing is not None:
                    await writing
            return []

    return ocp.type_handlers.create_type_handler_registry(
        (int, ocp.type_handlers.ScalarHandler()),
        (float, ocp.type_handlers.ScalarHandler()),
        (str, ocp.type_handlers.StringHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (Lazy, LazyHandler()),
    )


def _said(chosen: Plan) -> dict[str, Any]:
    import flaxslim

    return {
        "version": flaxslim.__version__,
        "spec": chosen.spec.name,
        "exact": chosen.exact,
        "removed_parameters": chosen.removed_parameters,
        "widths": {resize.width: resize.after for resize in chosen.resizes},
    }
