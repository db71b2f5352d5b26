"""Arguments that are no such thing at all: refused by name, in errors of ours."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxslim
from flaxslim import Pair, Spec
from flaxslim.errors import TracedError

MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))
CFG = {"hidden": 2}
X = np.ones((2, 2), np.float32)


def params() -> dict[str, Any]:
    """Two channels, the first of which nothing reads."""
    down = jnp.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    return {"up": {"kernel": jnp.eye(2)}, "down": {"kernel": down}}


def forward(tree: Any, x: Any) -> Any:
    return x @ tree["up"]["kernel"] @ tree["down"]["kernel"]


# --- arrays that were donated -----------------------------------------------------------------

PLAN = flaxslim.plan(params(), CFG, MLP)
DONATED = {
    "slim": lambda tree, _: flaxslim.slim(tree, CFG, MLP),
    "plan": lambda tree, _: flaxslim.plan(tree, CFG, MLP),
    "apply": lambda tree, _: flaxslim.apply(PLAN, tree),
    "apply to a state": lambda tree, _: flaxslim.apply(PLAN, {"ema": tree}, like=params()),
    "shrink": lambda tree, _: flaxslim.shrink(tree, None, CFG, MLP),
    "channel_mask": lambda tree, _: flaxslim.channel_mask(tree, MLP),
    "keep_dead": lambda tree, _: flaxslim.keep_dead(MLP).init(tree),
    "verify": lambda tree, _: flaxslim.verify(params(), tree, forward, inputs=X, spec=MLP),
    "prune": lambda tree, _: flaxslim.prune(tree, CFG, MLP, model=forward, batches=[X], keep=0.5),
    "save": lambda tree, path: flaxslim.save(path / "out", tree, {"model_type": "bert"}),
}


@pytest.mark.parametrize("way", DONATED)
def test_a_deleted_array_is_named(way, tmp_path):
    tree = params()
    tree["down"]["kernel"].delete()
    with pytest.raises(TracedError, match="an array was deleted") as caught:
        DONATED[way](tree, tmp_path)
    assert (caught.value.path or "").endswith("down/kernel")
    assert "donate" in str(caught.value.mend)


def test_a_deleted_array_may_say_the_shapes_from_before_the_cut():
    tree, state = params(), optax.sgd(0.1, momentum=0.9).init(params())
    tree["down"]["kernel"].delete()
    small: Any = flaxslim.apply(PLAN, state, like=tree)
    assert small[0].trace["down"]["kernel"].shape == (1, 3)
