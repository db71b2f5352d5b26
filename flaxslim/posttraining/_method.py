"""How channels are chosen without training, and how the others make up for them: the presets."""

import dataclasses
from collections.abc import Mapping

from flaxslim._errors import CalibrationError
from flaxslim.posttraining._rank import check_score
from flaxslim.posttraining._tune import Tune
from flaxslim.training._score import ScoreFn

COMPENSATIONS = ("none", "mean", "scale", "refit")
ALLOCATIONS = ("site", "global")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How to choose channels, and what to do about the error.

    Attributes:
      score: "obs" (greedy, by exact error), or the name of another one (`_rank`), or a function
        `fn(params, grads, state) -> (s, f)` as in `flaxslim.pruning`.
      compensation: "refit" solves for the second layer on the channels that stay, "scale" for one
        number for each of them, "mean" folds the mean of what goes into the second bias (nothing
        where there is none; "refit" and "scale" do it too), "none" does nothing.
      allocation: what `keep=` is a share of: "site", of the channels of each, or "global", of the
        parameters of all prunable channels, which go where they are missed the least. That asks
        for `width="per_layer"`. (A budget always chooses by what is missed.)
      sequential: each site is refitted to the outputs of the dense model on what it reads in the
        network that is pruned already, so that errors do not pile up. A pass over the data for
        each site.
      ridge: of the refit, relative to the mean square of a channel; None: the best of four on
        batches that are held out.
      tune: a distillation of what is left; None for none.

    Raises `CalibrationError` for a score or a compensation that is not known.
    """

    score: str | ScoreFn = "obs"
    compensation: str = "refit"
    allocation: str = "site"
    sequential: bool = False
    ridge: float | None = None
    tune: Tune | None = None

    def __post_init__(self) -> None:
        check_score(self.score)
        for name, known in (("compensation", COMPENSATIONS), ("allocation", ALLOCATIONS)):
            if (value := getattr(self, name)) not in known:
                raise CalibrationError(
                    f"there is no such {name}", seen=repr(value), expected=", ".join(known)
                )
        if self.ridge is not None and not 0 < self.ridge < float("inf"):
            raise CalibrationError(
                "a ridge is positive",
                seen=f"ridge={self.ridge}",
                expected="such as 1e-2, of the mean square of a channel; None to have it chosen",
            )


PRESETS: Mapping[str, Method] = {
    "fast": Method(score="wanda"),
    "balanced": Method(),
    "fisher": Method(score="fisher_mask", compensation="scale", sequential=True),
    "best": Method(tune=Tune()),
}

# What the literature compares with: "ls" is a refit by least squares with one ridge.
REFERENCES: Mapping[str, Method] = {
    "random": Method(score="random", compensation="none"),
    "magnitude": Method(score="magnitude_product", compensation="none"),
    "wanda": Method(score="wanda", compensation="none"),
    "magnitude+ls": Method(score="magnitude_product", ridge=1e-2),
    "wanda+ls": Method(score="wanda", ridge=1e-2),
    "obs": Method(ridge=1e-2),
}
