"""Any parameter container as `path -> leaf`, and back as the same kind.

Dicts, `FrozenDict`s, `nnx.State`s and every other registered pytree go through
`jax.tree_util`, an `nnx.Module` or `nnx.Optimizer` through `nnx.split` and `nnx.merge`. A path
joins the keys with slashes (`"encoder/layer/0/output/dense/kernel"`); the box around a leaf (an
`nnx.Param`, a `linen.Partitioned`) is not part of it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from flaxslim.errors import PlanError, TracedError, UnsupportedTreeError

_NAME_OF = {DictKey: "key", FlattenedIndexKey: "key", GetAttrKey: "name", SequenceKey: "idx"}

# The attribute by which a box holds its leaf, in nnx and linen, over the flax releases.
_BOX_ATTRIBUTES = frozenset({"value", "raw_value"})

_GRAPHS = (nnx.Module, nnx.Optimizer)


def name_of(keys: tuple[Any, ...]) -> str:
    """A path of `jax.tree_util` as a string."""
    if keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name in _BOX_ATTRIBUTES:
        keys = keys[:-1]
    return "/".join([str(getattr(key, _NAME_OF.get(type(key), ""), key)) for key in keys])


def _leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    if isinstance(tree, _GRAPHS):
        tree = nnx.state(tree)
    try:
        pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    except (ValueError, TypeError) as error:  # 7 and "b" have no order
        raise UnsupportedTreeError(
            "JAX cannot flatten the tree",
            seen=str(error).partition("\n")[0],
            expected="dicts whose keys can be sorted: all strings, or all numbers",
        ) from error
    if len(pairs) == 1 and not pairs[0][0]:
        raise UnsupportedTreeError(
            f"a {type(tree).__name__} is not a tree of parameters",
            expected="a dict, FrozenDict, nnx.State, nnx.Module, or another pytree of dicts",
            mend="pass model.params of a Hugging Face Flax model, "
            'variables["params"] of a Linen one, or the nnx module itself',
        )
    named = [(name_of(keys), leaf) for keys, leaf in pairs]
    if len(dict(named)) < len(named):
        counts = Counter(path for path, _ in named)
        raise UnsupportedTreeError(
            "two leaves have the same path",
            path=max(counts, key=counts.__getitem__),
            mend='rename one of the keys: {"a/b": x} and {"a": {"b": x}} cannot be told apart',
        )
    return named, treedef


def flatten(tree: Any) -> dict[str, Any]:
    """All leaves of a parameter container by path.

    Raises `UnsupportedTreeError` for something that is no tree.

    >>> flatten({"dense": {"kernel": 1, "bias": 2}})
    {'dense/bias': 2, 'dense/kernel': 1}
    """
    return dict(_leaves(tree)[0])


def check_living(leaves: Mapping[str, Any]) -> None:
    """Raise `TracedError` for an array whose buffer is gone, as it is after donation."""
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise TracedError(
                "an array was deleted: its buffer was given to another, and no values are left",
                path=path,
                seen=f"{leaf.dtype} {tuple(leaf.shape)} without values",
                mend="pass the tree that the step function gave back, not the one that was donated "
                "to it (jax.jit(..., donate_argnums=...))",
            )


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The same container with some leaves replaced; all others pass through by identity.

    Raises `PlanError` if a path is not in the tree.

    >>> replace({"a": {"b": 1}, "c": 2}, {"a/b": 3})
    {'a': {'b': 3}, 'c': 2}
    """
    pairs, treedef = _leaves(tree)
    unknown = sorted(set(leaves) - {path for path, _ in pairs})
    if unknown:
        raise PlanError("the tree has no such tensor", path=unknown[0])
    new = treedef.unflatten([leaves.get(path, leaf) for path, leaf in pairs])
    if isinstance(tree, _GRAPHS):
        return nnx.merge(nnx.graphdef(tree), new)
    return _in_order_of(tree, new)


def _in_order_of(old: Any, new: Any) -> Any:
    """Dicts come out of `jax.tree_util` sorted; here they keep the order that they had."""
    if type(old) is not dict:
        return new
    return {key: _in_order_of(old[key], new[key]) for key in old}
