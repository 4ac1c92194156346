"""LoRA adapters in PEFT's format, always relative to a target's ORIGINAL weights: W + (alpha / r) B A.

PiSSA and Seeking train on a base from which their first factors were subtracted. What is stored is the difference to
the untouched base, so that `PeftModel.from_pretrained`, vLLM and `pkt evaluate` need nothing but the target itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.errors import UserError, shown
from pkt_stages.hub import is_pinned

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base"  # key of the weights' metadata
_LEAD = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "embed_in")
# Settings of PEFT that say nothing of the finished update, or only beside others that are refused.
_FREE = frozenset(
    (
        *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "target_modules", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    )
)
# What some others may be; all that are not named here must be off. These initialisations leave the base weights alone.
_VALUES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": (None, "CAUSAL_LM"),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}


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
        return product.mT if module.rpartition(".")[2] in _EMBEDDINGS else product

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


def save_adapter(folder: Path, adapter: Adapter, base_model: str, base: Mapping[str, str | None] | None = None) -> None:
    """Write the adapter as PEFT does (float32), in place of what `folder` held; it appears whole or not at all.

    Args:
        base_model: the target's name, without a path, for PEFT's config.
        base: the target's identity (`load.identity`), which stays with the weights wherever they are copied to; a
            commit on the hub goes into PEFT's config, too.

    Raises:
        UserError: `folder` holds something else or cannot be written, or a factor holds NaN or infinity.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    commit = base.get("revision") if base is not None else None
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=sorted(adapter.factors),
        base_model_name_or_path=base_model,
        revision=commit if is_pinned(commit) else None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    # PEFT keeps the modules as a set, whose order differs between processes.
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, sort_keys=True, indent=2, default=list) + "\n"
    tensors = {}
    for module, factors in adapter.factors.items():
        for letter, factor in zip("AB", factors, strict=True):
            name = f"{_LEAD}{module}.lora_{_factor(module, letter)}"
            tensors[name] = factor.detach().cpu().float().contiguous()
            if not artifacts.is_finite(tensors[name]):
                raise UserError(f"{folder}: the adapter's factors of {module} hold NaN or infinity; not written")
    with artifacts.replaced_folder(folder, CONFIG) as beside:
        (beside / CONFIG).write_text(text, encoding="utf-8")
        # One key alone: several are written in random order.
        metadata = {"format": "pt"} if base is None else {BASE: json.dumps(dict(base), sort_keys=True)}
        save_file(tensors, beside / WEIGHTS, metadata=metadata)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _check_files(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: expected a PEFT adapter, {name} is missing")


def base_of(folder: Path) -> dict[str, str | None] | None:
    """The identity of the model that an adapter was made for, as far as it says so; None if it does not.

    A stranger's adapter has a name (`base_model_name_or_path`) and at best a commit: a revision that can change is
    None.

    Raises:
        UserError: files that are not readable.
    """
    from safetensors import SafetensorError, safe_open

    _check_files(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(BASE, "null"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable PEFT adapter ({' '.join(str(error).split())[:300]})") from None
    if isinstance(said, dict) and all(isinstance(said.get(key), str) for key in ("name", "revision")):
        return {"name": said["name"], "revision": said["revision"]}
    name, revision = (
        (config.get(key) for key in ("base_model_name_or_path", "revision"))
        if isinstance(config, dict)
        else (None, None)
    )
    if not isinstance(name, str) or not name:
        return None
    return {"name": name, "revision": revision if isinstance(revision, str) and is_pinned(revision) else None}


def load_adapter(folder: Path) -> Adapter:
    """Read a plain LoRA adapter in PEFT's format.

    Its settings are held to an allow-list: one that PEFT would compute something else for than W + (lora_alpha / r) B A
    of the target's original weights is refused by name, as is one that is not known here.

    Raises:
        UserError: files that are missing or malformed, another kind of adapter, or settings that do not go with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_files(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable PEFT adapter ({' '.join(str(error).split())[:300]})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: expected a LoRA adapter, found {_kind(config)}")
    for name, value in config.items():
        if name not in _FREE and not _is_plain(name, value):
            raise UserError(f"{folder}: its {name} ({shown(value)}) is not supported; {_advice(name)}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix(_LEAD).rpartition(".lora_")
        letter = rest.removeprefix("embedding_").removesuffix(".weight")
        if not name.startswith(_LEAD) or not module or rest != _factor(module, letter) or tensor.ndim != 2:
            raise UserError(f"{folder}: unexpected tensor {name} of shape {list(tensor.shape)} in a LoRA adapter")
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in artifacts.FLOATS:
            raise UserError(f"{folder}: tensor {name} is {dtype}; expected one of {', '.join(artifacts.FLOATS)}")
        found.setdefault(module, {})[letter] = tensor
    rank, alpha = config.get("r"), _number(config.get("lora_alpha"))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or alpha is None:
        said = f"{shown(rank)} and {shown(config.get('lora_alpha'))}"
        raise UserError(f"{folder}: expected numbers r above 0 and lora_alpha, found {said}")
    for module, pair in found.items():
        if set(pair) != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise UserError(f"{folder}: the factors of {module} are not A [{rank}, in] and B [out, {rank}]")
        if not _is_target(module, config.get("target_modules")):
            raise UserError(
                f"{folder}: holds factors of {module}, which its target_modules"
                f" ({shown(config.get('target_modules'))}) do not name, so that PEFT would pass over them"
            )
    if not found:
        raise UserError(f"{folder}: an adapter without weights")
    return Adapter({module: (pair["A"], pair["B"]) for module, pair in found.items()}, alpha)


def _factor(module: str, letter: str) -> str | None:
    """What PEFT calls the factor A or B of a module, behind `lora_`."""
    if letter not in ("A", "B"):
        return None
    return f"embedding_{letter}" if module.rpartition(".")[2] in _EMBEDDINGS else f"{letter}.weight"


def _is_plain(name: str, value: Any) -> bool:
    """Whether this setting leaves the update at (lora_alpha / r) B A; one that is not known must be off."""
    if name in _VALUES:
        return any(type(value) is type(allowed) and value == allowed for allowed in _VALUES[name])
    return value is None or value is False or value in ("", [], {})


def _advice(name: str) -> str:
    if name != "init_lora_weights":
        return "expected plain LoRA: W + (lora_alpha / r) B A of the original weights"
    return (
        "such a start changes the base weights, to which alone the factors belong; save the adapter with PEFT's"
        " path_initial_model_for_weight_conversion, which makes plain LoRA of it"
    )


def _number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _is_target(module: str, targets: Any) -> bool:
    """Whether PEFT puts an adapter on this module: it is named, or its name's end is; or a pattern matches it whole."""
    if isinstance(targets, str):
        try:
            return regex.fullmatch(targets, module, timeout=1) is not None
        except (regex.error, TimeoutError):
            return False
    names = targets if isinstance(targets, list) else []
    return any(isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names)


def _kind(config: Any) -> str:
    return shown(config.get("peft_type", "no peft_type")) if isinstance(config, dict) else type(config).__name__
