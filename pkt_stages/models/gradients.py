"""What the answers' loss asks of two models, summed up: gradients at the outputs of projections (METHODS 11.4).

For a layer pair nine places: the outputs of the seven projections, and those of the two norms, where the gradients of
all that reads them meet. Source and target see the same examples, so that token i of one model belongs to token i of
the other. An example's loss is the mean over its answer's tokens, and its gradient lies at all tokens that the answer
depends on; in the last layer, behind the attention, at those alone that predict the answer. Sums are float64 over
streamed minibatches, some pairs of layers at a time, as those of activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.batches import padding_mask
from pkt_stages.models.correlation import SIDES, Correlation, Pair, Place, Sums, add
from pkt_stages.models.losses import example_losses
from pkt_stages.models.sites import PROJECTIONS, family, module_name
from pkt_stages.progress import track

LIST = "gradients.json"
# By the activation that a norm makes, the block in front of which it stands.
NORMS = {"attn_in": "attn", "ffn_in": "ffn"}


class Gradients(Correlation):
    """What `pkt gradients` left, each pair's sums read when asked for; `count` are the tokens of all examples."""

    kind, mark = artifacts.GRADIENTS, LIST


def gradient_sums(
    models: Sequence[Any], batches: Sequence[Sequence[Encoded]], pairs: Sequence[Pair], *, grams: bool
) -> dict[Pair, dict[str, Sums]]:
    """Sums over all tokens by pair and place.

    Args:
        models: source and target; their parameters need no gradients.
        batches: examples, some at a time.
        grams: keep either side's own sums of products whole, too.

    Raises:
        UserError: a layer whose gradients are not finite, or zero everywhere.
    """
    found: dict[Pair, dict[str, Sums]] = {}
    for batch in track(batches, "minibatches for the gradients"):
        mask = padding_mask([example.ids for example in batch]).bool()
        kept = []
        for side, model in enumerate(models):
            layers = sorted({pair[side] for pair in pairs})
            with begun_at(model, layers[0]), output_gradients(_places(model, layers)) as gradients:
                example_losses(model, batch).sum().backward()
            kept.append({place: value[mask.to(value.device)].double() for place, value in gradients.items()})
        for pair in pairs:
            for name in (*PROJECTIONS, *NORMS):
                a, b = (here[name, layer] for here, layer in zip(kept, pair, strict=True))
                add(found.setdefault(pair, {}), name, a, b.to(a.device), None, grams)
    for pair, sums in found.items():
        for side, which in enumerate(SIDES):
            # A layer that adds nothing has no gradient at some places; none at all, or NaN, is a fault.
            if not 0 < sum(float(one.squares[side].sum()) for one in sums.values()) < float("inf"):
                raise UserError(
                    f"layer {pair[side]} of the {which}: the answers' gradients are zero or not finite; use a wider"
                    " dtype, and examples with answers"
                )
    return found


def _places(model: Any, layers: Sequence[int]) -> Iterator[tuple[Place, Any]]:
    for layer in layers:
        for weight in PROJECTIONS:
            yield (weight, layer), model.get_submodule(module_name(weight, layer))
        for name, block in NORMS.items():
            kind = family(model.config)
            yield (name, layer), model.get_submodule(f"{kind.layer(layer)}.{kind.before[block]}")


@contextmanager
def begun_at(model: Any, layer: int) -> Iterator[None]:
    """Within the context the graph of a forward pass begins in front of a layer; what lies before it costs nothing."""

    def begin(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].detach().requires_grad_(True), *inputs[1:])

    handle = model.model.layers[layer].register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def output_gradients(places: Iterable[tuple[Place, Any]]) -> Iterator[dict[Place, Tensor]]:
    """Within the context a backward pass leaves its gradient at the modules' outputs, by place.

    Args:
        places: what to keep a gradient under, and the module, which runs once.
    """
    kept: dict[Place, Tensor] = {}

    def wanted(place: Place) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: kept.__setitem__(place, gradient.detach()))

        return hook

    handles = [module.register_forward_hook(wanted(place)) for place, module in places]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
