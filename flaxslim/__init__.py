"""flaxslim: make a JAX transformer physically smaller without changing what it computes."""

from flaxslim._apply import apply as apply
from flaxslim._errors import FlaxslimError as FlaxslimError
from flaxslim._errors import NothingRemovedWarning as NothingRemovedWarning
from flaxslim._plan import Plan as Plan
from flaxslim._plan import plan as plan
from flaxslim._slim import slim as slim
from flaxslim._spec import Pair as Pair
from flaxslim._spec import Site as Site
from flaxslim._spec import Spec as Spec
