"""What looks along an axis and is no sum: no index of it can go."""

from flaxslim._discover._rules._table import axis_rule
from flaxslim._discover._rules._values import changed, without
from flaxslim._discover._trace import Equation, Value


@axis_rule("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
           "argmax", "argmin")  # fmt: skip
def reduce(e: Equation) -> list[Value]:
    (x,), axes = e.inputs, e.params["axes"]
    what = {"argmax": "the largest", "argmin": "the smallest"}.get(e.name, f"the {e.name[7:]}")
    e.block([x.dims[i] for i in axes], f"{what} over it is taken")
    return [Value(without(x.dims, axes))]


@axis_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(e: Equation) -> list[Value]:
    return [changed(e, e.inputs[0].dims, [e.params["axis"]], "it is summed up along")]


@axis_rule("sort")
def sort(e: Equation) -> list[Value]:
    dims = [e.same(*each) for each in zip(*(v.dims for v in e.inputs), strict=True)]
    value = changed(e, dims, [e.params["dimension"]], "it is sorted")
    return [value] * len(e.inputs)


@axis_rule("top_k", "approx_top_k")
def top_k(e: Equation) -> list[Value]:
    (x,), at = e.inputs, e.params.get("axis", e.params.get("reduction_dimension", -1))
    return [changed(e, x.dims, [at % len(x.dims)], "the largest along it are picked")] * 2


@axis_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def reduce_window(e: Equation) -> list[Value]:
    p = e.params
    if len(e.shapes) != 1:
        return e.unknown()
    still = (1, 1, 1, 1, (0, 0))
    keys = ("window_dimensions", "window_strides", "base_dilation", "window_dilation", "padding")
    at = [i for i, own in enumerate(zip(*(p[key] for key in keys), strict=True)) if own != still]
    return [changed(e, e.inputs[0].dims, at, "a window slides along it")]


@axis_rule("fft")
def fft(e: Equation) -> list[Value]:
    (x,), count = e.inputs, len(e.params["fft_lengths"])
    at = range(len(x.dims) - count, len(x.dims))
    return [changed(e, x.dims, at, "it is Fourier transformed")]
