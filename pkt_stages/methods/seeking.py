"""The source's most sensitive sub-matrices, added to the target's weights as they are (paper section 3; METHODS 6).

Each is the source's values where its weight is most sensitive, in the shape of the target's weight (`pkt seek`; Zhong
et al. 2023, appendix B.2): its best approximation of rank r, as their published code has it, or the whole. Nothing is
aligned: row i of the target's weight gets whatever row stands i-th in the sub-matrix. The source must be as large as
the target in every weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkt_stages import artifacts
from pkt_stages.core.delta import low_rank_factors
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import DenseDelta
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.load import identity
from pkt_stages.models.recipe import Block
from pkt_stages.models.sites import module_name
from pkt_stages.models.submatrices import read_submatrices
from pkt_stages.params import option


@dataclass(frozen=True)
class Params:
    """Settings of the method."""

    rank: int | None = option(16, "Keep so many singular values (an adapter); None: the whole matrices.", ge=1)
    block: Block = option(
        "sensitive", "Part of the source's weights: sensitive, or random, uniform or subclone (seek.more_blocks)."
    )


def derive(inputs: Inputs, params: Params) -> Derived:
    """An adapter, or whole weights.

    Raises:
        UserError: other inputs than --target and --submatrices, sub-matrices of another target, or a rank above a
            weight's side.
    """
    target, submatrices = inputs.only("target", "submatrices")
    found = artifacts.load(submatrices, artifacts.SUBMATRICES)
    model = identity(target)
    values = read_submatrices(found, model, target.location, params.block)
    if params.rank is None:
        weights = {f"{module}.weight": value.float() for module, value in values.items()}
        return Derived({"delta": DenseDelta(weights)}, model, found.meta["source"]["model"])
    factors = {}
    for module, value in values.items():
        # PEFT's factors of an embedding are of the transposed weight.
        stored = value.mT if module == module_name("embedding", 0) else value
        try:
            factors[module] = low_rank_factors(stored, params.rank)
        except ValueError as error:
            raise UserError(f"{module}: {error}") from None
    return Derived({"delta": Adapter(factors, alpha=params.rank)}, model, found.meta["source"]["model"])
