"""LoRA adapters in PEFT's format, always relative to a target's ORIGINAL weights: W + (alpha / r) B A.

PiSSA and Seeking train on a base from which their first factors were subtracted. What is stored is the difference to
the untouched base, so that `PeftModel.from_pretrained`, vLLM and `pkt evaluate` need nothing but the target itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LEAD = "base_model.model."
_EMBEDDING = "embed_tokens"


@dataclass(frozen=True)
class Adapter:
    """The factors of one adapter.

    Attributes:
        factors: by the module's name in the model (`model.layers.0.mlp.up_proj`): A [r, in] and B [out, r]. An
            embedding's weight counts as [in = d_model, out = vocabulary] transposed, as PEFT has it.
        alpha: the update is alpha / r times B A.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float

    @property
    def rank(self) -> int:
        return int(next(iter(self.factors.values()))[0].shape[0])

    def delta(self, module: str) -> Tensor:
        """What is added to the module's weight, float32, in the weight's own shape."""
        a, b = (factor.float() for factor in self.factors[module])
        product = (self.alpha / self.rank) * (b @ a)
        return product.mT if module.endswith(_EMBEDDING) else product

    def minus(self, other: Adapter) -> Adapter:
        """The adapter of rank r + r' whose update is this one's minus the other's (equal modules, equal alpha / r)."""
        import torch

        assert self.factors.keys() == other.factors.keys()
        assert self.alpha / self.rank == other.alpha / other.rank
        factors = {
            module: (torch.cat([a, other.factors[module][0]]), torch.cat([b, -other.factors[module][1]], dim=1))
            for module, (a, b) in self.factors.items()
        }
        return Adapter(factors, self.alpha + other.alpha)


def save_adapter(folder: Path, adapter: Adapter, base_model: str) -> None:
    """Write the adapter as PEFT does (float32), in place of what `folder` held; it appears whole or not at all.

    Args:
        base_model: the target's name, without a path, for PEFT's config.

    Raises:
        UserError: `folder` holds something else or cannot be written, or a factor holds NaN or infinity.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=sorted(adapter.factors),
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    # PEFT keeps the modules as a set, whose order differs between processes.
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, sort_keys=True, indent=2, default=list) + "\n"
    tensors = {}
    for module, factors in adapter.factors.items():
        for letter, factor in zip("AB", factors, strict=True):
            name = f"lora_embedding_{letter}" if module.endswith(_EMBEDDING) else f"lora_{letter}.weight"
            tensors[f"{_LEAD}{module}.{name}"] = factor.detach().cpu().float().contiguous()
            if not bool(tensors[f"{_LEAD}{module}.{name}"].isfinite().all()):
                raise UserError(f"{folder}: the adapter's factors of {module} hold NaN or infinity; not written")
    with artifacts.replaced_folder(folder, CONFIG) as beside:
        (beside / CONFIG).write_text(text, encoding="utf-8")
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def load_adapter(folder: Path) -> Adapter:
    """Read a plain LoRA adapter in PEFT's format.

    Raises:
        UserError: files that are missing or malformed, or a kind of adapter that is more than W + (alpha / r) B A.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: expected a PEFT adapter, {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable PEFT adapter ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: expected a LoRA adapter, found {_kind(config)}")
    for setting in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if config.get(setting):
            raise UserError(f"{folder}: its {setting} is not supported; expected plain LoRA")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix(_LEAD).rpartition(".lora_")
        letter = rest.removeprefix("embedding_").removesuffix(".weight")
        if not name.startswith(_LEAD) or not module or letter not in ("A", "B") or tensor.ndim != 2:
            raise UserError(f"{folder}: unexpected tensor {name} of shape {list(tensor.shape)} in a LoRA adapter")
        found.setdefault(module, {})[letter] = tensor
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or rank == 0:
        raise UserError(f"{folder}: expected numbers r above 0 and lora_alpha, found {rank!r} and {alpha!r}")
    for module, pair in found.items():
        if set(pair) != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise UserError(f"{folder}: the factors of {module} are not A [{rank}, in] and B [out, {rank}]")
    if not found:
        raise UserError(f"{folder}: an adapter without weights")
    return Adapter({module: (pair["A"], pair["B"]) for module, pair in found.items()}, float(alpha))


def _kind(config: Any) -> str:
    return str(config.get("peft_type", "no peft_type")) if isinstance(config, dict) else type(config).__name__
