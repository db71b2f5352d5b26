"""Every family from its PyTorch class: read by PyTorch names, slimmed, loaded by the stock classes.

Left out: BLOOM, whose width no config can say (test_families.py shows the refusal). The composites
with a BART decoder are run without a cache: transformers' own cache of such a pair is broken.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from kill import kill
from zoo import CASES, Case

import flaxslim
from flaxslim._apply import resized
from flaxslim._compat import parameter_shapes
from flaxslim._inputs import inputs_for
from flaxslim._spec import Site, Spec
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.specs import spec_for

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

SLIMMABLE = [case for case in CASES if case.family != "bloom"]
# One of each layout (plain, transposed, gated, two stacks) also runs in Flax in the ordinary run.
IN_FLAX = ("FlaxBertForMaskedLM", "FlaxGPT2LMHeadModel-inner", "FlaxLlamaForCausalLM")
# The largest living channel of a site may be silent on some inputs (relu); eight are not.
CHANNELS_TRIED = 8

Outputs = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: more threads only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _marked(cases):
    return [
        pytest.param(case, id=str(case), marks=[] if case.short else pytest.mark.long)
        for case in cases
        if case.torch_cls_name is not None
    ]


def _torch_cls(case: Case) -> Any:
    import transformers

    return getattr(transformers, str(case.torch_cls_name))


def _random_model(case: Case) -> Any:
    """The PyTorch model, with values that let every bias and kernel matter, and no row at zero."""
    torch.manual_seed(0)
    model = _torch_cls(case)(case.config()).eval()
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if not p.requires_grad:  # a table of sines, which is not saved
                    continue
                if isinstance(module, torch.nn.Embedding) or name == "bias":
                    p.normal_(std=0.5)
                elif p.ndim > 1:
                    fan = np.prod(p.shape[2:]) * np.sqrt(p.shape[0] * p.shape[1])
                    p.normal_(std=1.2 / np.sqrt(fan))
                else:
                    p.normal_(mean=1.0, std=0.1)
    return model


def _nested(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict as the tree that `read` gives for it; the arrays share the model's memory."""
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor.detach().numpy()
    return tree


def _kill_in_place(model: Any, spec: Spec) -> dict[str, np.ndarray]:
    """Zero second rows of a model, at random; returns the dead channels by site."""
    leaves = flatten(tree := _nested(model.state_dict()))
    killed, dead = kill(tree, spec.sites(tree))
    for path, leaf in flatten(killed).items():
        leaves[path][...] = leaf
    return dead


def _inputs(case: Case, model: Any) -> dict[str, Any]:
    known = inspect.signature(model.forward).parameters
    arrays = inputs_for(case.cls, model.config, length=case.length)
    assert arrays.keys() <= known.keys()
    tensors = {
        name: torch.tensor(x if x.dtype == np.float32 else x.astype(np.int64))
        for name, x in arrays.items()
    }
    return {**tensors, **({"use_cache": False} if "use_cache" in known else {})}


def _run(model: Any, inputs: dict[str, Any]) -> Outputs:
    with torch.no_grad():
        result = model(**inputs)
    return {
        name: x.numpy().copy()
        for name, x in result.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }


def _apart(a: Outputs, b: Outputs) -> float:
    """The largest difference of any output, relative to the largest value of that output."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[k] - b[k]).max() / np.abs(a[k]).max()) for k in a)


def _wrong_cuts(model: Any, sites: tuple[Site, ...], inputs: dict[str, Any]) -> Iterator[float]:
    """What it changes, site by site, to take a living channel away."""
    right, leaves = _run(model, inputs), flatten(_nested(model.state_dict()))
    for site in sites:
        array, axes = leaves[site.second.path], site.second.axes
        stored, changes = array.copy(), []
        for channel in np.argsort(-axes.norm(array, "f"))[:CHANNELS_TRIED]:
            array[...] = axes.zero(stored, "f", np.array([channel]))
            changes.append(_apart(right, _run(model, inputs)))
            array[...] = stored
            if changes[-1] > 1e-3:
                break
        yield max(changes)


@pytest.mark.parametrize("case", _marked(SLIMMABLE))
def test_pytorch_checkpoint_is_slimmed_for_both_worlds(case: Case, tmp_path):
    model = _random_model(case)
    inputs = _inputs(case, model)
    dense = _run(model, inputs)
    spec = spec_for(model.config).torch()
    dead = _kill_in_place(model, spec)
    model.save_pretrained(tmp_path / "zeroed")

    zeroed = read(tmp_path / "zeroed")
    assert (zeroed.naming, zeroed.format) == ("torch", "safetensors")
    chosen = flaxslim.plan(zeroed.params, zeroed.config, spec)
    assert {cut.site.second.path for cut in chosen.cuts} == set(dead)
    assert chosen.exact
    assert chosen.removed > 0
    params, cfg = flaxslim.apply(chosen, zeroed.params), resized(chosen, zeroed.config)
    out = flaxslim.save(tmp_path / "slimmed", params, cfg, like=zeroed)

    # The stock PyTorch class: it finds as many tensors as before, and computes the same.
    _, stock = _torch_cls(case).from_pretrained(zeroed.folder, output_loading_info=True)
    slimmed, found = _torch_cls(case).from_pretrained(out, output_loading_info=True)
    assert found == stock
    assert not found["mismatched_keys"]
    pruned, small = _run(model, inputs), _run(slimmed.eval(), inputs)
    apart = _apart(pruned, small)
    assert apart <= 1e-5
    assert _apart(dense, pruned) > 1e-3
    sites = spec.sites(_nested(slimmed.state_dict()))
    assert {site.root: site.size for site in sites} == {
        cut.site.root: len(cut.keep) for cut in chosen.cuts
    }
    assert all(change > max(1e-4, 1000 * apart) for change in _wrong_cuts(slimmed, sites, inputs))

    # The stock Flax class, on the new config: exactly its tensors.
    loaded, _ = flaxslim.load(out)
    wanted = {p: tuple(x.shape) for p, x in flatten(parameter_shapes(case.cls, cfg)).items()}
    assert {path: leaf.shape for path, leaf in flatten(loaded).items()} == wanted
    if str(case) in IN_FLAX:
        assert _apart(small, _run_flax(case, out, loaded, small)) <= 1e-5


def _run_flax(case: Case, folder: Any, loaded: Any, wanted: Outputs) -> Outputs:
    """By the stock Flax class, which must read from the files what `load` did."""
    import jax

    cls: Any = case.cls
    model = cls.from_pretrained(folder, from_pt=True)
    theirs, ours = flatten(model.params), flatten(loaded)
    assert theirs.keys() == ours.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(leaf, ours[path], err_msg=path)
    arrays = inputs_for(cls, model.config, length=case.length)
    with jax.default_matmul_precision("highest"):
        result = jax.jit(lambda p, x: dict(model(**x, params=p)))(model.params, arrays)
    return {name: np.asarray(result[name]) for name in wanted}
