"""LoRA on a target, and what it starts from (METHODS sections 5 and 6): one function per initialisation.

Each leaves the model's output as it was, which `started` checks. `pissa` and `seeking` therefore subtract their first
(alpha / r) B A from the base weights; what they learned is the difference of two adapters (`Adapter.minus`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.recipe import Init
from pkt_stages.models.sites import SITES, family

_NAME = "default"  # PEFT's name of the only adapter
_LEAD = "base_model.model."
# A relative error of the logits above this means more than rounding.
_UNCHANGED = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Lora:
    """Sizes of an adapter.

    Attributes:
        modules: names of the linear (or embedding) modules that receive one.
        rank: r.
        alpha: the update is alpha / r times B A.
        dropout: of the adapter's input, 0 .. 1.
    """

    modules: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float


def site_modules(config: Any, layers: Iterable[int] | None = None) -> tuple[str, ...]:
    """The modules of the four sites in these layers, or all; one that holds other weights as well is adapted whole."""
    kind = family(config)
    numbers = range(config.num_hidden_layers) if layers is None else layers
    return tuple(kind.module(site, layer) for layer in numbers for site in SITES)


@dataclass(frozen=True)
class Start:
    """A model that is ready to be trained.

    Attributes:
        model: with its adapter (PEFT).
        alpha: the adapter's.
        subtracted: the adapter whose update was taken from the base weights, if any.
        error: largest change of the logits by that, as a share of the largest of them.
    """

    model: Any
    alpha: float
    subtracted: Adapter | None
    error: float


def started(
    model: Any, lora: Lora, init: Init, submatrices: Mapping[str, Tensor], examples: Sequence[Encoded]
) -> Start:
    """Put an adapter into the model, and check on the first examples' logits that nothing changed by that.

    In 16 bits the reduced base of `pissa` and `seeking` is rounded; the finished adapter is for the unrounded one.

    Args:
        submatrices: for `seeking`, the source's values by module.

    Raises:
        UserError: the adapter does not fit the model, or its logits changed by more than rounding.
    """
    check_sizes(model, lora)
    check_submatrices(model, submatrices)
    before = logits_of(model, examples[:4])
    dtype = str(model.dtype).removeprefix("torch.")
    model = INITIALISATIONS[init](model, lora, submatrices)
    error = unchanged_error(before, logits_of(model, examples[:4]), dtype)
    subtracted = adapter_of(model, lora.alpha) if init in SUBTRACTED else None
    return Start(model, lora.alpha, subtracted, error)


def random(model: Any, lora: Lora, submatrices: Mapping[str, Tensor]) -> Any:
    """A Gaussian of standard deviation 1 / r, B zero (Hu et al. 2021); draws from torch's global generator."""
    return _attach(model, lora, "gaussian")


def pissa(model: Any, lora: Lora, submatrices: Mapping[str, Tensor]) -> Any:
    """The principal singular vectors of each of the target's own weights (Meng et al. 2024)."""
    return _attach(model, lora, "pissa")


def seeking(model: Any, lora: Lora, submatrices: Mapping[str, Tensor]) -> Any:
    """The principal singular vectors of the source's sub-matrices (Zhong et al. 2023; appendix B.2).

    Args:
        submatrices: by module, the source's values in the shape of the target's weight.
    """
    from pkt_stages.core.delta import low_rank_factors

    peft_model = _attach(model, lora, "gaussian")
    for name, module in _lora_modules(peft_model).items():
        values = submatrices[name].float()
        base = module.get_base_layer().weight
        embedding = _NAME in module.lora_embedding_A
        a, b = (f.to(base.device) for f in low_rank_factors(values.mT if embedding else values, lora.rank))
        for held, factor in zip(_factors(module), (a, b), strict=True):
            held.data.copy_(factor)
        product = (lora.alpha / lora.rank) * (b @ a)
        # In float32, whatever the weight's dtype: the difference is rounded once.
        base.data.copy_(base.float() - (product.mT if embedding else product))
    return peft_model


INITIALISATIONS: dict[Init, Callable[[Any, Lora, Mapping[str, Tensor]], Any]] = {
    "random": random,
    "pissa": pissa,
    "seeking": seeking,
}
SUBTRACTED = ("pissa", "seeking")  # they take their first update from the base weights


def adapter_of(peft_model: Any, alpha: float) -> Adapter:
    """A copy of the model's factors as they are now, float32 on the CPU."""
    factors = {
        name: tuple(factor.detach().cpu().float().clone() for factor in _factors(module))
        for name, module in _lora_modules(peft_model).items()
    }
    return Adapter({name: (pair[0], pair[1]) for name, pair in factors.items()}, alpha)


def check_sizes(model: Any, lora: Lora) -> None:
    """Raise UserError if a module is missing, is tied to another, or has a side smaller than the rank."""
    for name in lora.modules:
        try:
            weight = model.get_submodule(name).weight
        except AttributeError:
            raise UserError(f"the target has no module {name}; expected a model with that weight") from None
        if lora.rank > min(weight.shape):
            raise UserError(
                f"rank {lora.rank} is larger than a side of {name} {list(weight.shape)};"
                f" use at most {min(weight.shape)}"
            )
        kind = family(model.config)
        if name in (kind.module("embedding", 0), kind.module("head", 0)) and model.config.tie_word_embeddings:
            raise UserError(f"{name}: the target's embedding and head are one weight; leave both out of the sites")


def logits_of(model: Any, examples: Sequence[Encoded]) -> list[Tensor]:
    """Logits [token, vocabulary] of each example, float32 on the CPU, without dropout."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        found = [
            model(input_ids=torch.tensor([e.ids], device=device), use_cache=False).logits[0].float().cpu()
            for e in examples
        ]
    model.train(was_training)
    return found


def unchanged_error(before: Sequence[Tensor], after: Sequence[Tensor], dtype: str) -> float:
    """max |after - before| / max |before| over the logits.

    Raises:
        UserError: it is more than rounding in `dtype` explains.
    """
    largest = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    error = largest / max(float(b.abs().max()) for b in before)
    if not error <= _UNCHANGED[dtype]:
        raise UserError(
            f"the initialisation changed the target's logits by {error:.1e} (relative; at most {_UNCHANGED[dtype]:.0e}"
            f" in {dtype}); use dtype float32"
        )
    return error


def check_submatrices(model: Any, submatrices: Mapping[str, Tensor]) -> None:
    """Raise UserError unless every sub-matrix has the shape of its module's weight."""
    for name, values in submatrices.items():
        expected = list(model.get_submodule(name).weight.shape)
        if list(values.shape) != expected:
            raise UserError(f"{name}: expected a sub-matrix of shape {expected}, found {list(values.shape)}")


def _attach(model: Any, lora: Lora, init: str) -> Any:
    """The model with PEFT's adapters in it (float32); its base weights may be changed in place."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.modules),
        init_lora_weights=init,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    # A checkpoint's adapter is loaded into this model, not onto a new base.
    config.init_lora_weights = True
    return peft_model


def _lora_modules(peft_model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(_LEAD): module for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)
    }


def _factors(module: Any) -> tuple[Tensor, Tensor]:
    if _NAME in module.lora_embedding_A:
        return module.lora_embedding_A[_NAME], module.lora_embedding_B[_NAME]
    return module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
