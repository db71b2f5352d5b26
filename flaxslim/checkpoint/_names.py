"""PyTorch names <-> Flax names, by the rule of transformers itself.

`rename_key_and_reshape_tensor` of transformers.modeling_flax_pytorch_utils says how one PyTorch
tensor is called in Flax and how its axes are permuted. It is asked once per tensor with a small
array of distinct sizes, which gives a table that is then used in both directions.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxslim._lazy import transposed
from flaxslim._spec import Spec
from flaxslim._tree import flatten
from flaxslim.checkpoint._leaf import Leaf, nest
from flaxslim.checkpoint._unplaced import is_tied, of_dropped_layers, twin, unplaced
from flaxslim.errors import ConfigError
from flaxslim.specs import spec_for

# Distinct sizes, so that the shape which comes back says how the axes were permuted.
_PRIMES = (2, 3, 5, 7, 11, 13)


@dataclass(frozen=True, kw_only=True)
class FlaxName:
    """Where a PyTorch tensor lies in the Flax tree: `flax = torch.transpose(axes)`."""

    path: str
    axes: tuple[int, ...]

    @property
    def back(self) -> tuple[int, ...]:
        """`torch = flax.transpose(back)`."""
        return tuple(int(axis) for axis in np.argsort(self.axes))


def table(
    ndims: Mapping[str, int], flax_paths: Iterable[str], base: str = ""
) -> dict[str, FlaxName]:
    """PyTorch name -> Flax name, for those PyTorch tensors that the Flax tree has.

    Args:
        ndims: number of axes of each PyTorch tensor.
        flax_paths: all paths of the Flax tree (with "params" and "batch_stats" if it has them).
        base: the class's `base_model_prefix`. A base model may be read into a head class or the
            other way round; of all ways to add or drop a prefix the one with most hits is taken.
    """
    collection = _collections(flax_paths)
    tops = {path.split("/")[0] for path in collection} | {base}
    names = {name.split(".")[0] for name in ndims} | {base}
    ways = [("", "")]
    ways += [(prefix, "") for prefix in sorted(names - {""})]
    ways += [("", prefix) for prefix in sorted(tops - {""})]
    best: dict[str, FlaxName] = {}
    for drop, add in ways:
        found = _renamed(ndims, collection, drop, add)
        if _hits(found) > _hits(best):
            best = found
        if _hits(best) == len(collection):
            break
    return {
        name: FlaxName(path=collection[new.path] + new.path, axes=new.axes)
        for name, new in best.items()
    }


def _hits(found: Mapping[str, FlaxName]) -> int:
    return len({name.path for name in found.values()})


def _collections(paths: Iterable[str]) -> dict[str, str]:
    """Path without its collection -> the collection ("params/", "batch_stats/" or none)."""
    paths = list(paths)
    tops = {path.split("/")[0] for path in paths}
    if not tops or not tops <= {"params", "batch_stats"}:
        return dict.fromkeys(paths, "")
    return {path.split("/", 1)[1]: path.split("/")[0] + "/" for path in paths if "/" in path}


def _renamed(
    ndims: Mapping[str, int], needed: Mapping[str, str], drop: str, add: str
) -> dict[str, FlaxName]:
    from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

    children: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for path in needed:
        key = tuple(path.split("/"))
        children.setdefault(key[:-1], []).append(key)
    found = {}
    for name, ndim in ndims.items():
        key = tuple(name.split("."))
        if drop and key[0] == drop:
            key = key[1:]
        if not key:
            continue
        # The rule asks only for siblings, and copies the whole collection at each question.
        siblings = children.get(key[:-1], []) + children.get((add, *key[:-1]), [])
        probe = np.empty(_PRIMES[:ndim], np.int8)
        new, permuted = rename_key_and_reshape_tensor(
            key,  # pyright: ignore[reportArgumentType]
            probe,
            dict.fromkeys(siblings),  # pyright: ignore[reportArgumentType]
            add,
        )
        path = "/".join(new)
        if add and f"{add}/{path}" in needed:
            path = f"{add}/{path}"
        if path in needed:
            axes = tuple(_PRIMES.index(size) for size in permuted.shape)
            found[name] = FlaxName(path=path, axes=axes)
    return found


def dotted(params: Any) -> dict[str, Any]:
    """A nested PyTorch-named tree by full PyTorch name.

    >>> dotted({"encoder": {"weight": 1}})
    {'encoder.weight': 1}
    """
    return {path.replace("/", "."): leaf for path, leaf in flatten(params).items()}


def naming_of(paths: Iterable[str]) -> str:
    """ "flax" or "torch", by the last parts of the paths.

    >>> naming_of(["dense/kernel", "dense/bias"])
    'flax'
    """
    last = {path.replace(".", "/").rsplit("/", 1)[-1] for path in paths}
    return "torch" if "weight" in last and not last & {"kernel", "embedding"} else "flax"


def spec_named(cfg: Any, part: str, naming: str) -> Spec:
    """The spec of a config's family (see `spec_for`), in PyTorch names if `naming` is "torch"."""
    return in_names(spec_for(cfg, part), naming)


def in_names(spec: Spec, naming: str) -> Spec:
    """A spec in PyTorch names if `naming` is "torch"."""
    return spec.torch() if naming == "torch" else spec


def to_flax(params: Any, cfg: Any = None, model_class: type | None = None) -> dict[str, Any]:
    """PyTorch-named parameters with the names and axes of their Flax class.

    Args:
        params: a dict with PyTorch names, nested as `read` gives it or flat as a state dict, or a
            `Checkpoint`. Flax-named parameters come back as they are.
        cfg: the config; may be left out with a `Checkpoint`.
        model_class: the Flax class whose tree is wanted; by default the one the config names.

    Leaves are views (transposed, same dtype); lazy ones stay lazy. A head that the config ties to
    the embedding, and that the files therefore lack, is the transposed embedding. Any other tensor
    that the class needs and the files lack is left out, with a warning; so are tensors that the
    class has no place for, with a warning about those that are `unused`. Raises `ConfigError` if a
    shape contradicts the config.

    >>> params = to_flax(read(folder))  # doctest: +SKIP
    """
    params, cfg = _of_checkpoint(params, cfg)
    if naming_of(flatten(params)) == "flax":
        return params
    found = convert(params, cfg, model_class)
    if found.unused:
        warnings.warn(
            f"{len(found.unused)} of {len(flatten(params))} tensors of the files have no place in "
            f"{found.class_name} and are left out: {some(found.unused)}.",
            stacklevel=2,
        )
    warn_of_missing(found)
    return found.params


def unused(params: Any, cfg: Any = None, model_class: type | None = None) -> tuple[str, ...]:
    """PyTorch names of the tensors that `to_flax` would leave out although they may matter.

    Takes what `to_flax` takes; Flax-named parameters have none. Not among them are buffers that
    are computed anew (position ids, causal masks, rotary frequencies, sinusoidal tables), counts of
    batches, and tensors tied (bitwise equal) to one that has a place.

    >>> unused(read("a/LlamaForSequenceClassification"))  # doctest: +SKIP
    ('score.weight',)
    """
    params, cfg = _of_checkpoint(params, cfg)
    if naming_of(flatten(params)) == "flax":
        return ()
    shapes, base, _ = _shapes(cfg, model_class)
    return without_place(dotted(params), shapes, base)


def without_place(
    tensors: Mapping[str, Any], flax_paths: Iterable[str], base: str = ""
) -> tuple[str, ...]:
    """The same for a flat PyTorch-named tree and the paths of a Flax one."""
    names = table({name: np.ndim(leaf) for name, leaf in tensors.items()}, flax_paths, base)
    return unplaced(tensors, names)


def some(names: Collection[str]) -> str:
    """Up to four names, for messages."""
    return ", ".join(list(names)[:4]) + (" ..." if len(names) > 4 else "")


def _of_checkpoint(params: Any, cfg: Any) -> tuple[Any, Any]:
    if hasattr(params, "weight_files"):
        return params.params, params.config if cfg is None else cfg
    return params, cfg


@dataclass(frozen=True, kw_only=True, eq=False)
class Converted:
    """A Flax tree, what of its class it lacks, and what of the PyTorch tree it has no place for."""

    params: dict[str, Any]
    class_name: str
    needed: int
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def warn_of_missing(found: Converted) -> None:
    """One warning about what the class needs and the files lack, if there is any."""
    if found.missing:
        warnings.warn(
            f"{len(found.missing)} of {found.needed} tensors of the Flax class are not in the "
            f"files and are left out: {some(found.missing)}. transformers makes them up at random; "
            "here a model that needs them refuses to run.",
            stacklevel=3,
        )


def convert(params: Any, cfg: Any, model_class: type | None = None) -> Converted:
    """What `to_flax` returns and warns of, for PyTorch-named parameters."""
    tensors = dotted(params)
    shapes, base, class_name = _shapes(cfg, model_class)
    names = table({name: np.ndim(leaf) for name, leaf in tensors.items()}, shapes, base)
    flat: dict[str, Any] = {}
    for name, new in names.items():
        leaf = transposed(tensors[name], new.axes)
        if tuple(leaf.shape) != shapes[new.path]:
            raise ConfigError(
                "the config's sizes contradict the tensors",
                path=f"{name} ({new.path} in Flax)",
                seen=f"shape {tuple(leaf.shape)}",
                expected=f"shape {shapes[new.path]} by the config",
                mend="use the config.json that belongs to these weights",
            )
        flat[new.path] = leaf
    _tie(flat, shapes, cfg)
    return Converted(
        params=nest(flat, "/"),
        class_name=class_name,
        needed=len(shapes),
        missing=tuple(sorted(set(shapes) - set(flat))),
        unused=unplaced(tensors, names),
    )


def _shapes(cfg: Any, model_class: type | None) -> tuple[dict[str, tuple[int, ...]], str, str]:
    """Tensor shapes of the Flax class, its base model prefix and name; nothing is allocated."""
    from flaxslim._compat import parameter_shapes
    from flaxslim._inputs import model_class_for

    cls: Any = model_class or model_class_for(cfg)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(parameter_shapes(cls, cfg)).items()}
    return shapes, getattr(cls, "base_model_prefix", ""), cls.__name__


def _tie(flat: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], cfg: Any) -> None:
    """Fill in a head that PyTorch ties to the embedding, so does not store, and Flax has."""
    tied = getattr(cfg, "tie_word_embeddings", False)
    for path in set(shapes) - set(flat):
        if not tied or not path.endswith("lm_head/kernel"):
            continue
        near = path[: -len("lm_head/kernel")]
        embeddings = [
            leaf
            for name, leaf in flat.items()
            if name.startswith(near)
            and name.endswith("/embedding")
            and leaf.shape[::-1] == shapes[path]
        ]
        if len(embeddings) == 1:
            flat[path] = transposed(embeddings[0], (1, 0))


# --- back -------------------------------------------------------------------------------------


def to_torch(params: Mapping[str, Any]) -> dict[str, Leaf]:
    """PyTorch name -> leaf for a flat Flax tree, by the general rule, with no source to follow.

    A kernel is a weight with its axes reversed (a 4-dimensional one, a convolution's, goes from
    (height, width, in, out) to (out, in, height, width)); scale and embedding are weights.
    """
    collection = _collections(params)
    leaves = {}
    for path, prefix in collection.items():
        *parents, last = path.split("/")
        leaf = params[prefix + path]
        axes = None
        if last == "kernel":
            axes = (3, 2, 0, 1) if leaf.ndim == 4 else tuple(reversed(range(leaf.ndim)))
        if prefix == "batch_stats/" and last in ("mean", "var"):
            last = f"running_{last}"
        elif last in ("kernel", "scale", "embedding"):
            last = "weight"
        leaves[".".join([*parents, last])] = Leaf(array=leaf, axes=axes)
    return leaves


def to_torch_like(
    params: Mapping[str, Any], source: Mapping[str, Any], *, layers: int = 0
) -> dict[str, Leaf]:
    """PyTorch name -> leaf for a flat Flax tree, with the names of the checkpoint it came from.

    Tensors of the source that have no place in the Flax tree are kept as they are; one that is
    tied to (bitwise equal to) a tensor that has a place follows it. Flax tensors that the source
    has not are added by the general rule, but for a head that is only the embedding again. Of its
    first `layers` layers those that the Flax tree no longer has are left out.
    """
    names = table({name: np.ndim(leaf) for name, leaf in source.items()}, params)
    leaves = {name: Leaf(array=params[new.path], axes=new.back) for name, new in names.items()}
    dropped = of_dropped_layers(source, names, layers)
    for name in source:
        if name not in leaves and name not in dropped:
            other = twin(name, names, source)
            leaves[name] = leaves[other] if other else Leaf(array=source[name])
    rest = set(params) - {new.path for new in names.values()}
    if (place := _place_of_base(names, rest)) is not None:
        leaves = {f"{place}.{name}": leaf for name, leaf in leaves.items()}
    for name, leaf in to_torch({path: params[path] for path in sorted(rest)}).items():
        if name not in leaves and not is_tied(leaf, leaves):
            leaves[name] = leaf
    return leaves


def beside(params: Mapping[str, Any], source: Mapping[str, Any]) -> tuple[int, int]:
    """What `to_torch_like` writes of the source besides the Flax tree: parameters, and bytes.

    Second copies of tied tensors are parameters again; buffers take bytes alone.
    """
    names = table({name: np.ndim(leaf) for name, leaf in source.items()}, params)
    others = {
        name: int(np.prod(np.shape(leaf))) for name, leaf in source.items() if name not in names
    }
    again = sum(size for name, size in others.items() if twin(name, names, source))
    return again, sum(size * source[name].dtype.itemsize for name, size in others.items())


def _place_of_base(names: Mapping[str, FlaxName], rest: Collection[str]) -> str | None:
    """Where a class with a head has the base model that the source is of, by its names.

    Beside a head the base model's tensors have its place in front, or PyTorch finds no model.
    """
    places = {new.path.partition("/")[0] for new in names.values()}
    if len(places) != 1 or not rest:
        return None
    (place,) = places
    bare = all(new.path.split("/")[1:2] == [name.split(".")[0]] for name, new in names.items())
    return place if bare and any(not path.startswith(f"{place}/") for path in rest) else None
