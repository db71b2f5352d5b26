"""Sizes in any config object: read, resized as a new object of the same kind."""

import collections
import contextlib
import copy
import dataclasses
import functools
import math
import threading
import types
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from transformers import BertConfig, CLIPConfig, GPT2Config

from flaxslim import _config
from flaxslim._config import Width
from flaxslim.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    hidden: int = 4
    other: str = "x"


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: int = 8
    inner: Any = Inner()


@dataclasses.dataclass
class Plain:
    hidden: int = 8
    inner: Any = dataclasses.field(default_factory=Inner)


class ConfigDict(dict):
    """What matters of `ml_collections.ConfigDict`: attributes, locked, its own constructor."""

    def __init__(self, values: dict[str, Any], *, locked: bool):
        super().__init__(values)
        self.__dict__["locked"] = locked

    def unlock(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if self.locked and name not in self:
            raise AttributeError(f"{name} is not in the locked config")
        self[name] = value

    def __deepcopy__(self, memo: Any) -> "ConfigDict":
        return ConfigDict({k: copy.deepcopy(v, memo) for k, v in self.items()}, locked=self.locked)


class Attributes:
    def __init__(self):
        self.hidden, self.inner = 8, types.SimpleNamespace(hidden=4, other="x")


def _plain_data(cfg: Any) -> Any:
    if isinstance(cfg, dict | FrozenDict):
        return {k: _plain_data(v) for k, v in cfg.items()}
    if hasattr(cfg, "to_dict"):
        return cfg.to_dict()
    if dataclasses.is_dataclass(cfg) or hasattr(cfg, "__dict__"):
        return {k: _plain_data(v) for k, v in vars(cfg).items()}
    return cfg


CONFIGS = {
    "dict": lambda: {"hidden": 8, "inner": {"hidden": 4, "other": "x"}},
    "FrozenDict": lambda: FrozenDict({"hidden": 8, "inner": {"hidden": 4, "other": "x"}}),
    "OrderedDict": lambda: collections.OrderedDict(hidden=8, inner={"hidden": 4, "other": "x"}),
    "defaultdict": lambda: collections.defaultdict(
        list, hidden=8, inner={"hidden": 4, "other": "x"}
    ),
    "frozen dataclass": Frozen,
    "dataclass": Plain,
    "ConfigDict": lambda: ConfigDict(
        {"hidden": 8, "inner": ConfigDict({"hidden": 4, "other": "x"}, locked=True)}, locked=True
    ),
    "SimpleNamespace": lambda: types.SimpleNamespace(hidden=8, inner=Inner()),
    "object": Attributes,
}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_a_new_config_of_the_same_kind_comes_back(make):
    cfg, before = make(), _plain_data(make())
    assert _config.read(cfg, "hidden") == 8
    assert _config.read(cfg, "inner.hidden") == 4
    new = _config.replace(cfg, {"hidden": 3, "inner.hidden": 2})
    assert new is not cfg
    assert type(new) is type(cfg)
    assert _config.read(new, "hidden") == 3
    assert _config.read(new, "inner.hidden") == 2
    assert _config.read(new, "inner.other") == "x"
    assert type(_config.read(new, "inner")) is type(_config.read(cfg, "inner"))
    assert _plain_data(cfg) == before


def test_pretrained_config():
    cfg = BertConfig(intermediate_size=64, hidden_size=16)
    new = _config.replace(cfg, {"intermediate_size": 7})
    assert type(new) is BertConfig
    assert (cfg.intermediate_size, new.intermediate_size) == (64, 7)
    assert {**new.to_dict(), "intermediate_size": 64} == cfg.to_dict()


def test_nested_pretrained_config():
    cfg = CLIPConfig(text_config={"intermediate_size": 64}, vision_config={"intermediate_size": 32})
    new = _config.replace(cfg, {"text_config.intermediate_size": 7})
    assert type(new) is CLIPConfig
    assert type(new.text_config) is type(cfg.text_config)
    assert (cfg.text_config.intermediate_size, new.text_config.intermediate_size) == (64, 7)
    assert new.vision_config.intermediate_size == 32
    assert new.to_dict()["text_config"]["intermediate_size"] == 7


class Slots:
    __slots__ = ("hidden",)


class Tuple(NamedTuple):
    hidden: int = 8


def _slots() -> Slots:
    cfg = Slots()
    cfg.hidden = 8
    return cfg


@pytest.mark.parametrize(
    ("cfg", "key", "message"),
    [
        (_slots(), "new", "a Slots has no field to say this in"),
        (Tuple(), "new", "a Tuple has no field to say this in"),
        (Tuple(), "hidden", "a field of a Tuple cannot be set"),
        (Inner(), "new", "an? Inner has no field to say this in"),
        (CONFIGS["ConfigDict"](), "new", "a ConfigDict has no field to say this in"),
    ],
)
def test_a_config_that_cannot_hold_a_key_is_refused(cfg, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _config.replace(cfg, {key: 3})
    assert caught.value.path == key
    assert "hidden" in str(caught.value.seen)
    assert f'"{key}"' in str(caught.value.mend)


def test_a_config_with_slots_is_resized():
    cfg = _slots()
    new = _config.replace(cfg, {"hidden": 3})
    assert (cfg.hidden, new.hidden) == (8, 3)


def test_none_is_written_as_a_number():
    cfg = GPT2Config(n_embd=8)
    width = Width(expression="n_inner or 4*n_embd")
    assert cfg.n_inner is None
    assert width.read(cfg) == 32
    new = _config.replace(cfg, width.write(cfg, 5))
    assert (cfg.n_inner, new.n_inner) == (None, 5)
    assert width.read(new) == 5


@pytest.mark.parametrize(
    ("expression", "cfg", "width", "step", "key"),
    [
        ("d_ff", {"d_ff": 8}, 8, 1, "d_ff"),
        ("n_inner or 4*n_embd", {"n_inner": 9, "n_embd": 3}, 9, 1, "n_inner"),
        ("n_inner or 4*n_embd", {"n_inner": None, "n_embd": 3}, 12, 1, "n_inner"),
        ("ratio*hidden", {"ratio": 4, "hidden": 6}, 24, 6, "ratio"),
        ("swiglu(ratio*hidden)", {"ratio": 4, "hidden": 32}, 88, 8, "ratio"),
        ("4*hidden", {"hidden": 6}, 24, 6, None),
    ],
)
def test_widths(expression, cfg, width, step, key):
    w = Width(expression=expression)
    assert (w.read(cfg), w.step(cfg), w.key) == (width, step, key)
    inside = Width(expression=expression, prefix="part.")
    assert inside.read({"part": cfg}) == width
    assert inside.key == (key and f"part.{key}")


@quick
@given(st.integers(1, 6144).map(lambda n: 8 * n), st.integers(1, 4096))
def test_a_swiglu_width_that_is_written_is_read_again(width, hidden):
    w, cfg = Width(expression="swiglu(mlp_ratio*hidden_size)"), {"hidden_size": hidden}
    assert w.read(_config.replace(cfg, w.write(cfg, width))) == width


@quick
@given(st.integers(1, 10), st.integers(1, 4096))
def test_a_factor_is_written_as_a_whole_number(ratio, hidden):
    # The Flax class of DINOv2 does not accept 3.0 for 3.
    w, cfg = Width(expression="mlp_ratio*hidden_size"), {"hidden_size": hidden}
    values = w.write(cfg, ratio * hidden)
    assert values == {"mlp_ratio": ratio}
    assert isinstance(values["mlp_ratio"], int)


@pytest.mark.parametrize("expression", ["", "a b", "a+b", "or 4*a", "swiglu(a", "a*b*c"])
def test_a_width_that_cannot_be_read_is_refused(expression):
    with pytest.raises(ConfigError, match="cannot read the width"):
        Width(expression=expression)


@pytest.mark.parametrize("value", [0, -4, None, "4", True, [4], math.nan])
@pytest.mark.parametrize("expression", ["hidden/heads", "ratio*heads", "inner or 4*heads"])
def test_a_factor_that_is_no_positive_number_is_refused(expression, value):
    width = Width(expression=expression, prefix="part.")
    cfg = {"part": {"hidden": 8, "ratio": 4, "inner": None, "heads": value}}
    with pytest.raises(ConfigError, match="not a positive number") as caught:
        width.read(cfg)
    assert caught.value.path == "part.heads"
    assert caught.value.seen == repr(value)


@pytest.mark.parametrize("value", [None, "64", True, [64], math.nan])
def test_a_width_that_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match="is not a number") as caught:
        Width(expression="d_ff").read({"d_ff": value})
    assert "d_ff" in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("cfg", [{"intermediate_sise": 64}, BertConfig()])
def test_an_absent_key_names_the_nearest(cfg):
    with pytest.raises(ConfigError, match="no key 'intermediate_sizes'") as caught:
        _config.read(cfg, "intermediate_sizes")
    assert "intermediate_si" in str(caught.value).split("nearest:")[1]


def test_an_absent_nested_key_says_where():
    with pytest.raises(ConfigError, match=r"no key 'text_config\.d_ff'") as caught:
        _config.read({"text_config": {"dff": 1}}, "text_config.d_ff")
    assert caught.value.path == "text_config"
    assert caught.value.near == ("dff",)


def test_no_config_at_all():
    with pytest.raises(ConfigError, match="no key 'd_ff'"):
        _config.read(None, "d_ff")


@pytest.mark.parametrize("cfg", [None, {}, {"model_type": ""}, {"model_type": 3}, object()])
def test_a_config_without_a_model_type(cfg):
    assert _config.model_type(cfg) is None


def test_model_type():
    assert _config.model_type(BertConfig()) == "bert"
    assert _config.model_type({"model_type": "bert"}) == "bert"


@pytest.mark.parametrize("cfg", [Inner, types], ids=["class", "Python module"])
def test_what_cannot_be_copied_is_no_config(cfg):
    with pytest.raises(ConfigError, match="a config is an object"):
        _config.replace(cfg, {"hidden": 3})


@dataclasses.dataclass
class Derived:
    hidden: int = dataclasses.field(init=False, default=8)


class Locked:
    def __init__(self):
        self.hidden, self.lock = 8, threading.Lock()


@pytest.mark.parametrize("make", [Derived, Locked])
def test_a_field_that_cannot_be_set_is_told(make):
    cfg = make()
    with pytest.raises(ConfigError, match="cannot be set"):
        _config.replace(cfg, {"hidden": 3})
    assert cfg.hidden == 8


# --- configs whose fields hang together ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checked:
    hidden: int = 8
    heads: int = 2
    size: int = 4

    def __post_init__(self):
        assert self.heads * self.size == self.hidden, "heads * size is not hidden"


class Setters:
    def __init__(self):
        self._hidden = 8

    @property
    def hidden(self):
        return self._hidden

    @hidden.setter
    def hidden(self, value):
        if value % 2:
            raise ValueError("heads * size is not hidden")
        self._hidden = value


def test_keys_of_one_object_are_set_at_once():
    cfg = {"inner": Checked()}
    new = _config.replace(cfg, {"inner.heads": 1, "inner.size": 8})
    assert new == {"inner": Checked(8, 1, 8)}
    assert cfg == {"inner": Checked()}


@pytest.mark.parametrize(("cfg", "key"), [(Checked(), "heads"), (Setters(), "hidden")])
def test_what_a_class_raises_itself_is_told(cfg, key):
    with pytest.raises(ConfigError, match="refuses the sizes after the cut") as caught:
        _config.replace(cfg, {key: 3})
    assert caught.value.path == key
    assert "heads * size is not hidden" in str(caught.value.seen)
    assert "dict" in str(caught.value.mend)


@dataclasses.dataclass
class Computing:
    hidden: int = 8
    both: int | None = None  # an argument as well
    half: int = dataclasses.field(init=False, default=0)
    seen: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        self.half, self.third = self.hidden // 2, self.hidden // 3
        self.both = 2 * self.hidden if self.both is None else self.both


def test_what_a_dataclass_computes_follows_and_what_was_put_there_stays():
    cfg = Computing()
    cfg.name, cfg.seen = "mine", 5  # pyright: ignore[reportAttributeAccessIssue]
    new = _config.replace(cfg, {"hidden": 6})
    assert vars(new) == {
        "hidden": 6, "both": 16, "half": 3, "third": 2, "seen": 5, "name": "mine",
    }  # fmt: skip


def test_an_argument_that_was_computed_is_named():
    for cfg, prefix in ((Computing(), ""), ({"part": Computing()}, "part.")):
        values = {f"{prefix}hidden": 6}
        told = _config.computed(cfg, _config.replace(cfg, values), values)
        assert told == [f"{prefix}both = 16 (anew: 12)"]
    given = Computing(both=3)
    assert not _config.computed(given, _config.replace(given, {"hidden": 6}), {"hidden": 6})


@dataclasses.dataclass(slots=True)
class Slotted:
    hidden: int = 8
    seen: int = dataclasses.field(init=False, default=3)


def test_what_was_put_on_a_dataclass_with_slots_stays():
    cfg = Slotted()
    cfg.seen = 9
    assert dataclasses.astuple(_config.replace(cfg, {"hidden": 6})) == (6, 9)


@dataclasses.dataclass
class Table:
    hidden: int = 8
    scale: Any = dataclasses.field(init=False, default=None)
    table: Any = dataclasses.field(init=False)

    def __post_init__(self):
        self.table = np.arange(self.hidden)


def test_arrays_on_a_dataclass_stay_unless_its_class_computes_them():
    cfg: Any = Table()
    cfg.scale, cfg.note = np.ones(2), np.arange(3)
    new = _config.replace(cfg, {"hidden": 6})
    assert (new.scale is cfg.scale, new.note is cfg.note) == (True, True)
    assert new.table.tolist() == [*range(6)]
    cfg.table = np.zeros(8)
    assert _config.replace(cfg, {"hidden": 6}).table is cfg.table


class Caching:
    hidden = 8

    @functools.cached_property
    def twice(self):
        return 2 * self.hidden


class CachingMapping(dict):
    @functools.cached_property
    def twice(self):
        return 2 * self["hidden"]


@dataclasses.dataclass
class CachingFields:
    hidden: int = 8

    @functools.cached_property
    def twice(self):
        return 2 * self.hidden


@pytest.mark.parametrize(
    "make", [Caching, CachingFields, lambda: CachingMapping(hidden=8)], ids=["object", "dc", "dict"]
)
def test_a_cached_property_follows(make):
    cfg = make()
    assert cfg.twice == 16
    assert _config.replace(cfg, {"hidden": 6}).twice == 12
    assert cfg.twice == 16


def test_a_cached_property_that_is_the_width_is_set():
    assert _config.replace(Caching(), {"twice": 6}).twice == 6


# --- mappings whose keys are attributes ---------------------------------------------------------


class SelfDict(dict):
    def __init__(self, **values: Any):
        super().__init__(**values)
        self.__dict__ = self


class Beside(dict):
    """Its attributes are a copy of its keys."""

    def __init__(self, **values: Any):
        super().__init__(**values)
        self.__dict__.update(values)


@pytest.mark.parametrize("kind", [SelfDict, Beside])
def test_attributes_and_keys_agree_at_each_depth(kind):
    cfg = kind(hidden=8, inner=kind(hidden=4, deep=kind(hidden=2)))
    new = _config.replace(cfg, {"hidden": 6, "inner.hidden": 3, "inner.deep.hidden": 1})
    for one, sizes in ((new, (6, 3, 1)), (cfg, (8, 4, 2))):
        assert (one.hidden, one.inner.hidden, one.inner.deep.hidden) == sizes
        inner = one["inner"]
        assert (one["hidden"], inner["hidden"], inner["deep"]["hidden"]) == sizes


class Within(dict):
    """Its attributes are kept in an object of its own."""

    def __init__(self, **values: Any):
        super().__init__(**values)
        self._own = types.SimpleNamespace(**values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._own, name)


def test_a_mapping_that_would_contradict_itself_is_refused():
    cfg = Within(hidden=8)
    with pytest.raises(ConfigError, match="a field of a Within cannot be set"):
        _config.replace(cfg, {"hidden": 6})
    assert (cfg["hidden"], cfg.hidden) == (8, 8)


class Wrapping(MutableMapping):
    def __init__(self, values: dict[str, Any]):
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def test_a_mapping_that_wraps_a_dict_is_left_alone():
    cfg = Wrapping({"hidden": 8})
    assert dict(_config.replace(cfg, {"hidden": 6})) == {"hidden": 6}
    assert dict(cfg) == {"hidden": 8}


class Getting(dict):
    __getattr__, __setattr__ = dict.get, dict.__setitem__


class Indexing(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class Making(dict):
    """Makes what it is asked for, like `addict.Dict`."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __missing__(self, name: str) -> Any:
        self[name] = type(self)()
        return self[name]


class Answering:
    """Answers to any name."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)


@pytest.mark.parametrize("kind", [Getting, Indexing, Making, Answering])
def test_a_config_that_answers_to_any_name_is_not_asked_for_its_kind(kind):
    cfg = kind(hidden=8)
    new = _config.replace(cfg, {"hidden": 6})
    assert (type(new), new.hidden, cfg.hidden) == (kind, 6, 8)
    assert _config.keys(cfg) == _config.keys(new) == ["hidden"]


# --- configs with references, and those that check themselves -----------------------------------


def test_a_class_is_made_anew_only_for_fields_that_may_have_been_computed():
    made: list[Any] = []

    @dataclasses.dataclass
    class Counting:
        hidden: int = 8
        name: str = "x"
        sizes: list[int] = dataclasses.field(default_factory=list)
        both: int | None = None
        given: int = 1
        inner: Any = None

        def __post_init__(self):
            made.append(self)
            self.both = 2 * self.hidden if self.both is None else self.both

    cfg = Counting(given=2, inner=Inner())
    made.clear()
    values = {"hidden": 6, "inner.hidden": 3}
    new = _config.replace(cfg, values)
    assert len(made) == 1
    assert _config.computed(cfg, new, values) == ["both = 16 (anew: 12)"]
    assert len(made) == 1 + 2 + 1  # both before and after; what was given before only
    cfg, new = Counting(both=None), Counting(hidden=6)
    cfg.both = new.both = None
    made.clear()
    assert not _config.computed(cfg, new, {"hidden": 6})
    assert not made


class Ref:
    """What matters of `ml_collections.FieldReference`."""

    def __init__(self, value: Any):
        self.value = value


class Referring:
    """What matters of a `ml_collections.ConfigDict` with references: setting one sets them all."""

    def __init__(self, **fields: Any):
        self.__dict__["_fields"] = fields

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.__dict__["_fields"]:
            raise AttributeError(name)
        value = self._fields[name]
        return value.value if isinstance(value, Ref) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(old := self._fields.get(name), Ref):
            old.value = value
        else:
            self._fields[name] = value

    def __delitem__(self, name: str) -> None:
        del self._fields[name]

    __getitem__, __setitem__ = __getattr__, __setattr__

    def __iter__(self):
        return iter(self._fields)

    def keys(self):
        return self._fields.keys()

    def __deepcopy__(self, memo: Any) -> "Referring":
        return Referring(**copy.deepcopy(self._fields, memo))

    def unlock(self) -> None: ...

    def unlocked(self):
        return contextlib.nullcontext()


def _referring() -> Any:
    shared = Ref(8)
    return Referring(hidden=shared, other=shared, inner=Referring(hidden=shared))


def _ml_collections() -> Any:
    cfg = pytest.importorskip("ml_collections").ConfigDict({"hidden": 8})
    cfg.other = cfg.get_ref("hidden")
    cfg.inner = {"hidden": cfg.get_ref("hidden")}
    return cfg.lock()


@pytest.mark.parametrize("make", [_referring, _ml_collections])
@pytest.mark.parametrize("key", ["hidden", "other", "inner.hidden"])
def test_a_key_that_others_refer_to_is_set_alone(make, key):
    cfg, names = make(), ("hidden", "other", "inner.hidden")
    new = _config.replace(cfg, {key: 3})
    assert {name: _config.read(new, name) for name in names} == {**dict.fromkeys(names, 8), key: 3}
    assert {_config.read(cfg, name) for name in names} == {8}


@pytest.mark.parametrize("key", ["hidden", "inner.hidden"])
def test_keys_that_refer_to_the_width_stay_and_are_named(key):
    cfg = pytest.importorskip("ml_collections").ConfigDict({"hidden": 8, "inner": {"hidden": 8}})
    part = cfg.inner if "." in key else cfg
    cfg.twice = part.get_ref("hidden") * 2
    cfg.inner.half = part.get_ref("hidden") // 2
    cfg.lock()
    new = _config.replace(cfg, {key: 6})
    assert (new.twice, new.inner.half) == (cfg.twice, cfg.inner.half) == (16, 4)
    told = ["inner.half = 4 (anew: 3)", "twice = 16 (anew: 12)"]
    assert sorted(_config.computed(cfg, new, {key: 6})) == told
    within = _config.computed({"part": cfg}, {"part": new}, {f"part.{key}": 6})
    assert sorted(within) == [f"part.{one}" for one in told]
    assert (cfg.hidden, cfg.inner.hidden, cfg.is_locked) == (8, 8, True)


def test_a_key_that_has_no_value_yet_is_passed_by():
    kinds = pytest.importorskip("ml_collections")
    cfg = kinds.ConfigDict({"hidden": 8, "seed": kinds.config_dict.required_placeholder(int)})
    cfg.twice = cfg.get_ref("hidden") * 2
    new = _config.replace(cfg, {"hidden": 6})
    assert _config.computed(cfg, new, {"hidden": 6}) == ["twice = 16 (anew: 12)"]


def test_a_key_that_is_an_other_key_by_reference_is_named():
    cfg = _referring()
    told = _config.computed(cfg, _config.replace(cfg, {"hidden": 3}), {"hidden": 3})
    assert told == ["other = 8 (anew: 3)", "inner.hidden = 8 (anew: 3)"]


def test_a_frozen_config_dict_is_resized():
    kind = pytest.importorskip("ml_collections").FrozenConfigDict
    new = _config.replace(kind({"hidden": 8, "inner": {"hidden": 4}}), {"inner.hidden": 3})
    assert type(new) is kind
    assert new.to_dict() == {"hidden": 8, "inner": {"hidden": 3}}


def test_a_pydantic_model_is_checked_as_a_whole():
    pydantic = pytest.importorskip("pydantic")

    class Model(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(validate_assignment=True)
        hidden: int = 8
        heads: int = pydantic.Field(2, alias="n_heads")
        size: int = 4

        @pydantic.model_validator(mode="after")
        def _check(self):
            assert self.heads * self.size == self.hidden
            return self

    new = _config.replace(Model(), {"heads": 1, "size": 8})
    assert (type(new), new.heads, new.size, new.hidden) == (Model, 1, 8, 8)
    with pytest.raises(ConfigError, match="refuses the sizes"):
        _config.replace(Model(), {"heads": 1})
    with pytest.raises(ConfigError, match="has no field to say this in"):
        _config.replace(Model(), {"new": 1})


def test_fields_of_a_pydantic_model_stay_as_they_were():
    pydantic = pytest.importorskip("pydantic")

    class Model(pydantic.BaseModel):
        hidden: int = 8
        scale: float = 2.0
        total: int | None = None
        given: int | None = None
        derived: int = 0

        @pydantic.field_validator("scale", mode="before")
        def _double(cls, value: float) -> float:
            return 2 * value

        @pydantic.model_validator(mode="after")
        def _compute(self):
            self.total = 2 * self.hidden if self.total is None else self.total
            self.__dict__["derived"] = self.hidden + 1  # counts as not given
            return self

        @functools.cached_property
        def thrice(self):
            return 3 * self.hidden

    cfg = Model(scale=1.0, given=16)
    assert (cfg.scale, cfg.thrice) == (2.0, 24)
    new = _config.replace(cfg, {"hidden": 6})
    assert (new.hidden, new.scale, new.total, new.given, new.thrice) == (6, 2.0, 16, 16, 18)
    told = ["total = 16 (anew: 12)", "derived = 9 (anew: 7)"]
    assert _config.computed(cfg, new, {"hidden": 6}) == told
    within = _config.computed({"part": cfg}, {"part": new}, {"part.hidden": 6})
    assert within == [f"part.{one}" for one in told]


@pytest.mark.parametrize("alias", ["h", ("h", "width")])
def test_a_pydantic_field_is_given_by_its_validation_alias(alias):
    pydantic = pytest.importorskip("pydantic")
    names = alias if isinstance(alias, str) else pydantic.AliasChoices(*alias)

    class Model(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(frozen=True, extra="forbid")
        hidden: int = pydantic.Field(8, validation_alias=names)

    new = _config.replace(Model(h=8), {"hidden": 6})
    assert new == Model(h=6)
