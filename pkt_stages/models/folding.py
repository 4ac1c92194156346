"""A model's weights with the gains of its norms folded in, one at a time from disk.

A gain is a diagonal matrix between the residual stream and the maps that read it, and commutes with no rotation of the
stream. Folded into those maps (each read weight times the gain along its input), the norm before them has gain 1.
Multipliers, and the gain of a norm behind a block, are folded into the maps that write to the stream (along their
output); what such a norm divides by is the token's own and stays where it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.load import ModelRef
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.sites import Family, Geometry, family, geometry, module_name, setting

# What reads the residual stream, by the block that does; the others write to it, or pass between a layer's own parts.
READS = {"attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "ffn_gate": "ffn", "ffn_up": "ffn", "head": "final"}
WRITES = {"attn_o": "attn", "ffn_down": "ffn"}


def check_foldable(config: Any) -> None:
    """Raise UserError unless every gain can be folded into matrices with Llama's names."""
    kind = family(config)
    if reason := kind.foldable() or kind.whole_matrices():
        raise UserError(
            f"architecture {config.model_type!r}: transports and reexpress fold the norms' gains into the weights, and"
            f" {reason}"
        )


class Folded:
    """A checkpoint of a supported model, read weight by weight as float64.

    Attributes:
        tied: whether the head is the embedding; folded they are two.
        family: how the architecture adds its blocks.
    """

    def __init__(self, ref: ModelRef) -> None:
        """
        Raises:
            UserError: the model is not supported, or of a family whose gains cannot be folded; it holds no
                safetensors, or a gain is zero or not finite.
        """
        self.ref = ref
        self.checkpoint = Checkpoint(ref)
        self.config = self.checkpoint.config
        self.sizes: Geometry = geometry(self.config)
        self.family: Family = family(self.config)
        check_foldable(self.config)
        self.names = frozenset(self.checkpoint.names())
        self.tied = self.checkpoint.tied
        norms = {self.norm(weight, layer) for weight in READS for layer in range(self.sizes.num_layers)}
        norms |= {self.norm(weight, layer) for weight in WRITES for layer in range(self.sizes.num_layers)}
        for norm in sorted(norms - {None}, key=str):
            gain = self.family.gain(self.checkpoint.weight(f"{norm}.weight").double())
            if not bool((torch.isfinite(gain) & (gain != 0)).all()):
                bad = gain[~torch.isfinite(gain) | (gain == 0)]
                raise UserError(
                    f"{ref.location}: {len(bad)} gains of {norm} are zero or not finite, so that it cannot be folded"
                    " into the weights behind it; use another model"
                )

    def norm(self, weight: str, layer: int) -> str | None:
        """The norm in front of a weight that reads the residual stream, or behind one that writes to it."""
        if weight in WRITES:
            return self.family.norm_behind(WRITES[weight], layer)
        if READS[weight] == "final":
            return self.family.final_norm
        return f"{self.family.layer(layer)}.{self.family.before[READS[weight]]}"

    def gain(self, weight: str, layer: int) -> Tensor:
        """Gain [d_model] of the norm in front of a weight that reads the residual stream."""
        return self.family.gain(self.checkpoint.weight(f"{self.norm(weight, layer)}.weight").double())

    def written(self, weight: str, layer: int) -> Tensor:
        """What a weight's output is multiplied by behind it: [out], or one number for all.

        On the way from attn_o, ffn_down and the embedding into the residual stream, and from the head to the logits.
        """
        kind, scale = self.family, 1.0
        if weight == "embedding" and kind.embedding_scale is not None:
            scale = (
                self.sizes.d_model**0.5
                if kind.embedding_scale == "sqrt"
                else setting(self.config, kind.embedding_scale)
            )
        elif weight == "head":
            scale = 1 / setting(self.config, kind.logits_scaling)
        elif weight in WRITES:
            scale = setting(self.config, kind.multiplier)
            if (norm := self.norm(weight, layer)) is not None:
                return kind.gain(self.checkpoint.weight(f"{norm}.weight").double()) * scale
        return torch.tensor(scale, dtype=torch.float64)

    def stored(self, weight: str, layer: int = 0) -> Tensor:
        """A weight [out, in] as it is; of a tied head the embedding."""
        return self.checkpoint.weight(f"{module_name(weight, layer)}.weight").double()

    def stored_bias(self, weight: str, layer: int) -> Tensor | None:
        """A projection's bias [out] as it is, None if it has none."""
        name = f"{module_name(weight, layer)}.bias"
        return self.checkpoint.weight(name).double() if name in self.names else None

    def weight(self, weight: str, layer: int = 0) -> Tensor:
        """A weight [out, in] of `PROJECTIONS`, the embedding or the head, with what stands around it folded in."""
        found, written = self.stored(weight, layer), self.written(weight, layer)
        found = found * (written[:, None] if written.ndim else written)
        return found * self.gain(weight, layer) if weight in READS else found

    def bias(self, weight: str, layer: int) -> Tensor | None:
        """A projection's bias [out] likewise."""
        found = self.stored_bias(weight, layer)
        return found * self.written(weight, layer) if found is not None else None
