"""How channels are chosen without training, and how the others make up for them: the presets."""

import dataclasses
from collections.abc import Mapping

from flaxslim.errors import CalibrationError
from flaxslim.posttraining._rank import check_score
from flaxslim.posttraining._tune import Tune
from flaxslim.training._score import ScoreFn

COMPENSATIONS = ("none", "mean", "scale", "refit")
# Not "scale": scores by gradients let channels go that fire on a few tokens alone, such as [CLS],
# and so strongly that their mean, added to all tokens, drowns what these say.
FOLD_MEANS = ("mean", "refit")
ALLOCATIONS = ("site", "global")
SEQUENCES = ("no", "weights", "outputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How to choose channels, and what to do about the error.

    Attributes:
      score: "obs" (greedy, by exact error, arXiv 2302.04089), "fisher_mask" (arXiv 2204.09656),
        "fluctuation" (FLAP, arXiv 2312.11983), or one of `flaxslim.pruning` but "snip_momentum" and
        "movement" (docs/reference/training.md), or a function `fn(params, grads, state) -> (s, f)`
        as there.
      compensation: "refit" solves for the second layer on the channels that stay, "scale" for one
        number for each of them, "mean" folds the mean of what goes into the second bias (nothing
        where there is none; "refit" does it too), "none" does nothing.
      allocation: what `keep=` is a share of: "site", of the channels of each, or "global", of the
        parameters of all prunable channels, which go where they are missed the least. That asks
        for `width="per_layer"`. (A budget always chooses by what is missed.)
      sequential: "no": all sites are ranked and refitted on what they read in the dense model.
        Otherwise on what they read in the network as it is pruned by then, so that errors do not
        pile up: "weights", a few sites at a time, to what the dense second layer would make of
        that, as in SparseGPT (arXiv 2301.00774); "outputs", site by site, to what the dense model
        puts out there. A pass over the data for each of them.
      ridge: of the refit, relative to the mean square of a channel; None: the best of four on
        batches that are held out.
      tune: a distillation of what is left; None for none.
      hold_out: the refit leaves alone the batches that are held out, by which the error of the
        outputs then is measured, as it always is where something is tuned: to compare with that.

    Raises `CalibrationError` for a score or a compensation that is not known.
    """

    score: str | ScoreFn = "obs"
    compensation: str = "refit"
    allocation: str = "site"
    sequential: str = "no"
    ridge: float | None = None
    tune: Tune | None = None
    hold_out: bool = False

    @property
    def holds_out(self) -> bool:
        """Whether the error is measured on batches that nothing but a ridge was chosen by."""
        return self.hold_out or self.tune is not None

    def __post_init__(self) -> None:
        check_score(self.score)
        choices = {
            "compensation": COMPENSATIONS,
            "allocation": ALLOCATIONS,
            "sequential": SEQUENCES,
        }
        for name, known in choices.items():
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
    "balanced": Method(sequential="weights"),
    "fisher": Method(score="fisher_mask", compensation="scale", sequential="outputs"),
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
