"""A model's weights with the gains of its norms folded in, one at a time from disk.

A gain is a diagonal matrix between the residual stream and the maps that read it, and commutes with no rotation of the
stream. Folded into those maps (each read weight times the gain along its input), the norm before them has gain 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.load import ModelRef
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.sites import Geometry, geometry, module_name

# The norm in front of what reads the residual stream; the others write to it, or pass between a layer's own parts.
NORM_OF = {
    "attn_q": "model.layers.{}.input_layernorm",
    "attn_k": "model.layers.{}.input_layernorm",
    "attn_v": "model.layers.{}.input_layernorm",
    "ffn_gate": "model.layers.{}.post_attention_layernorm",
    "ffn_up": "model.layers.{}.post_attention_layernorm",
    "head": "model.norm",
}
PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")


class Folded:
    """A checkpoint of a supported model, read weight by weight as float64.

    Attributes:
        tied: whether the head is the embedding; folded they are two.
    """

    def __init__(self, ref: ModelRef) -> None:
        """
        Raises:
            UserError: the model is not supported, holds no safetensors, or a gain is zero or not finite.
        """
        self.ref = ref
        self.checkpoint = Checkpoint(ref)
        self.config = self.checkpoint.config
        self.sizes: Geometry = geometry(self.config)
        self.names = frozenset(self.checkpoint.names())
        self.tied = self.checkpoint.tied
        norms = {name.format(layer) for name in NORM_OF.values() for layer in range(self.sizes.num_layers)}
        for norm in sorted(norms):
            gain = self.checkpoint.weight(f"{norm}.weight")
            if not bool((torch.isfinite(gain) & (gain != 0)).all()):
                bad = gain[~torch.isfinite(gain) | (gain == 0)]
                raise UserError(
                    f"{ref.location}: {len(bad)} gains of {norm} are zero or not finite, so that it cannot be folded"
                    " into the weights behind it; use another model"
                )

    def gain(self, weight: str, layer: int) -> Tensor:
        """Gain [d_model] of the norm in front of a weight that reads the residual stream."""
        return self.checkpoint.weight(f"{NORM_OF[weight].format(layer)}.weight").double()

    def stored(self, weight: str, layer: int = 0) -> Tensor:
        """A weight [out, in] as it is; of a tied head the embedding."""
        return self.checkpoint.weight(f"{module_name(weight, layer)}.weight").double()

    def weight(self, weight: str, layer: int = 0) -> Tensor:
        """A weight [out, in] of `PROJECTIONS`, the embedding or the head, with the gain before it folded in."""
        found = self.stored(weight, layer)
        return found * self.gain(weight, layer) if weight in NORM_OF else found

    def bias(self, weight: str, layer: int) -> Tensor | None:
        """A projection's bias [out], None if it has none."""
        name = f"{module_name(weight, layer)}.bias"
        return self.checkpoint.weight(name).double() if name in self.names else None
