"""The ceiling: what training added to the target itself, which no method can surpass by moving what it moves.

With `vocabulary` the target becomes its own trained model, bit for bit but for rounding: every weight and gain gets the
difference of the two. Without, the seven projections of each layer with the gains of the norms before them, as a
transport moves them: then embedding, head and final norm stay the base model's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.changes import DenseDelta
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.load import identity
from pkt_stages.models.sites import PROJECTIONS, module_name
from pkt_stages.models.transport import Models, opened
from pkt_stages.params import option


@dataclass(frozen=True)
class Params:
    """Settings of the ceiling."""

    vocabulary: bool = option(True, "All weights; false: only those inside the layers.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """Whole weights.

    Raises:
        UserError: other inputs than --target (the base model) and --source (its trained one), or two shapes.
    """
    target, tuned = inputs.only("target", "source")
    models = opened(target, tuned, target)
    weights = whole(models) if params.vocabulary else inside_layers(models)
    return Derived({"delta": DenseDelta(weights)}, identity(target), identity(tuned))


def whole(models: Models) -> dict[str, Tensor]:
    """The difference of all weights, by name."""
    base, tuned = models.base.checkpoint, models.tuned.checkpoint
    if models.base.names != models.tuned.names:
        odd = min(models.base.names ^ models.tuned.names)
        raise UserError(f"{models.tuned.ref.location}: weight {odd} is in one of the two models alone")
    changes = {name: (tuned.weight(name).double() - base.weight(name).double()).float() for name in base.names()}
    return {name: change for name, change in changes.items() if bool(change.any())}


def inside_layers(models: Models) -> dict[str, Tensor]:
    """The difference of the projections with the gains before them, as changes of the projections alone."""
    found = {}
    for layer in range(models.target.sizes.num_layers):
        for weight in PROJECTIONS:
            module = module_name(weight, layer)
            found[f"{module}.weight"] = models.as_stored(weight, layer, models.change(weight, layer)).float()
            if (bias := models.bias_change(weight, layer)) is not None:
                found[f"{module}.bias"] = models.as_stored(weight, layer, bias).float()
    return found
