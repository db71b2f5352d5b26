"""What a recipe makes: the model that it starts from, the optimizer, and the schedules."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flaxslim
from flaxslim.cli._recipe import Recipe, Train
from flaxslim.errors import FlaxslimError, RecipeError, in_short
from flaxslim.specs import chosen


def model_class(recipe: Recipe) -> Any:
    """The Flax class of transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return getattr(transformers, recipe.model.cls)


def start(recipe: Recipe) -> tuple[Any, Any, Any]:
    """The class, parameters and config that a recipe begins with."""
    model, cls = recipe.model, model_class(recipe)
    if model.source is None:
        with sayable(recipe):
            cfg = cls.config_class(**model.config)
            params = cls(cfg, seed=recipe.seed).params
    else:
        revision = {"revision": model.revision} if model.revision else {}
        cfg = cls.config_class.from_pretrained(model.source, **revision)
        cfg.update(dict(model.config))
        loaded: Any = flaxslim.from_pretrained(
            cls, model.source, config=cfg, seed=recipe.seed, **revision
        )
        params = loaded.params
    cfg.architectures = [cls.__name__.removeprefix("Flax")]
    return cls, jax.tree.map(jnp.asarray, params), cfg


@contextlib.contextmanager
def sayable(recipe: Recipe) -> Iterator[None]:
    """What a class of transformers makes of wrong sizes, whatever it raises, as a `RecipeError`."""
    try:
        yield
    except FlaxslimError:
        raise
    except Exception as error:
        config = recipe.model.config
        told = ", ".join(f"{name} = {value!r}" for name, value in config.items())
        raise RecipeError(
            f"{recipe.model.cls} cannot be built or run with this config",
            path="[model.config]" if config else f"[model], source {recipe.model.source!r}",
            seen=in_short(error) + (f"; with {told}" if told else ""),
            expected="values that the class takes, and sizes that fit each other",
            mend="correct the values of [model.config], or the config.json of the source",
        ) from error


def learning_rate(train: Train, steps: int) -> optax.Schedule:
    """Up from zero in `warmup` steps, and down again."""
    top, left = train.learning_rate, steps - train.warmup
    falls = {
        "linear": lambda: optax.linear_schedule(top, 0.0, left),
        "cosine": lambda: optax.cosine_decay_schedule(top, left),
        "constant": lambda: optax.constant_schedule(top),
    }
    rise = optax.linear_schedule(0.0, top, max(train.warmup, 1))
    fall = falls[train.decay]()
    return optax.join_schedules([rise, fall], [train.warmup]) if train.warmup else fall


def check_widths(recipe: Recipe, cfg: Any) -> None:
    """Raise `RecipeError` if what is to be cut in the end has no key of the config to say it."""
    shrink = recipe.shrink
    if shrink.width != "uniform" or not (shrink.end or shrink.at):
        return
    for pair in chosen(recipe.pruning.spec, cfg):
        if recipe.pruning.shares.get(pair.axis) and pair.fixed:
            raise RecipeError(
                f"the class ties the number of {pair.unit} to other sizes, so that its config can "
                "say no smaller one",
                seen=f'pruning.spec = "{recipe.pruning.spec}", shrink.width = "uniform"',
                mend='shrink.width = "per_layer" (--set shrink.width=per_layer)',
            )


def check_floors(recipe: Recipe, params: Any, cfg: Any) -> None:
    """Raise `RecipeError` for a floor that lets no site of an axis lose anything.

    One is always kept, and a single layer that is as narrow by now is none of the recipe's.
    """
    pruning, widest = recipe.pruning, {}
    if not recipe.prunes or pruning.min_width <= 1:
        return
    for site in chosen(pruning.spec, cfg).sites(params, cfg):
        axis = site.pair.axis
        if axis not in widest or site.size > widest[axis].size:
            widest[axis] = site
    for axis, site in widest.items():
        if pruning.shares.get(axis) and pruning.min_width >= site.size:
            raise RecipeError(
                f"pruning.min_width keeps all {site.pair.unit} of every layer",
                path=site.second.path,
                seen=f"min_width = {pruning.min_width}",
                expected=f"less than {site.size}, which the widest layer has",
                mend="lower pruning.min_width, or leave it out",
            )


def optimizer(recipe: Recipe, cfg: Any, steps: int, *, prunes: bool) -> Any:
    """The optimizer of a recipe, for a model of these sizes."""
    inner = _inner(recipe.train, learning_rate(recipe.train, steps))
    if not prunes:
        return inner
    p = recipe.pruning
    return flaxslim.pruning(
        inner,
        chosen(p.spec, cfg),
        schedules(recipe),
        p.score,
        cfg=cfg,
        allocation=p.allocation,
        min_width=p.min_width,
        max_sparsity=p.max_sparsity,
        fade=p.fade,
        regrow=p.regrow,
        seed=recipe.seed,
    )


def _inner(train: Train, rate: optax.Schedule) -> optax.GradientTransformation:
    decay = train.weight_decay
    made = {
        "adamw": lambda: optax.adamw(rate, weight_decay=decay),
        "adam": lambda: _decayed(decay, optax.adam(rate)),
        "lion": lambda: optax.lion(rate, weight_decay=decay),
        "sgd": lambda: _decayed(decay, optax.sgd(rate, momentum=0.9)),
    }[train.optimizer]()
    return optax.chain(optax.clip_by_global_norm(train.clip), made) if train.clip else made


def _decayed(decay: float, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), tx) if decay else tx


def schedules(recipe: Recipe) -> dict[str, Any]:
    """When channels die, by axis."""
    p = recipe.pruning
    if p.schedule == "stepwise":
        steps = {int(step): share for step, share in p.stepwise.items()}
        return dict.fromkeys(p.axes, flaxslim.stepwise(steps))
    if p.schedule == "one_shot":
        return {axis: flaxslim.one_shot(share, at=p.begin) for axis, share in p.shares.items()}
    ramp = {
        "linear": flaxslim.linear,
        "cubic": flaxslim.cubic,
        "exponential": flaxslim.exponential,
    }[p.schedule]
    assert p.end is not None  # the recipe was checked
    return {
        axis: ramp(min(p.start, share), share, begin=p.begin, end=p.end, every=p.every)
        for axis, share in p.shares.items()
    }
