"""Loading models and tokenizers from a local folder, a folder that points to the hub, or a hub name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages import hub
from pkt_stages.errors import UserError
from pkt_stages.models.sites import Geometry, geometry
from pkt_stages.params import build

if TYPE_CHECKING:
    import torch

CHAT_TEMPLATE = "chat_template.jinja"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# Deeper than any model there is: transformers builds its modules one by one, which a wrong number would never end.
MAX_LAYERS = 1000


@dataclass(frozen=True)
class ModelRef:
    """Which model: a local folder, or a hub repository at a revision.

    Attributes:
        chat_template: Jinja text that takes the place of the tokenizer's own.
        sizes: of its geometry, if its `hub.yaml` tells them.
    """

    location: str
    revision: str | None = None
    chat_template: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()


def resolve(model: str) -> ModelRef:
    """Follow `hub.yaml` in a folder ({repo, revision}), else take a folder, or a hub name: `owner/name@revision`.

    A `chat_template.jinja` beside it gives a template to a model that has none, or another one.

    Raises:
        UserError: a path that does not exist, a pointer that is not {repo, revision} or has sizes that are not those
            of a geometry, or a folder with an adapter.
    """
    folder = Path(model)
    pointer = folder / hub.POINTER
    if pointer.is_file():
        named = hub.read_model_pointer(pointer)
        if named.sizes:
            _check_sizes(pointer, named.sizes)
        template = folder / CHAT_TEMPLATE
        text = template.read_text(encoding="utf-8") if template.is_file() else None
        return ModelRef(named.repo, named.revision, text, tuple(sorted(named.sizes.items())))
    if folder.is_dir():
        if (folder / ADAPTER).is_file():
            raise UserError(
                f"{model}: holds an adapter ({ADAPTER}), which would change the model unseen; give the base model's"
                " folder, and the adapter as --delta"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{model}: a folder without config.json; expected a Hugging Face model folder")
        if (folder / INDEX).is_file():
            _check_index(folder / INDEX)
        return ModelRef(model)
    name, at, revision = model.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or (at and not revision):
        raise UserError(f"{model}: no such folder, and not a hub name of the form owner/name or owner/name@revision")
    return ModelRef(name, revision or None)


def _check_sizes(pointer: Path, sizes: Mapping[str, int]) -> None:
    """Raise UserError unless these are a geometry's sizes, all of them."""
    build(Geometry, sizes, f"{pointer}: sizes")
    if small := [name for name, size in sizes.items() if size < 1]:
        raise UserError(f"{pointer}: sizes: {small[0]}: expected a number above 0, found {sizes[small[0]]}")


def _check_index(path: Path) -> None:
    """Raise UserError unless the index of a split checkpoint names files beside it; `identity` covers no others."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not readable as the index of a checkpoint") from None
    for name in files:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{path}: names {name!r}; expected safetensors files in the same folder")


def load_config(ref: ModelRef) -> Any:
    """The model's config; only supported architectures and sizes get through, and none that bring their own code.

    Raises:
        UserError: see above, or a config that cannot be read.
    """
    from transformers import AutoConfig

    config = hub.explained(
        ref.location,
        ref.revision,
        lambda: AutoConfig.from_pretrained(ref.location, revision=ref.revision, trust_remote_code=False),
    )
    if getattr(config, "auto_map", None):
        raise UserError(
            f"{ref.location}: its config.json asks for code of its own (auto_map), which is never run; use a model of"
            " an architecture that transformers has"
        )
    sizes = hub.explained(ref.location, ref.revision, lambda: geometry(config))
    if not 1 <= sizes.num_layers <= MAX_LAYERS:
        raise UserError(f"{ref.location}: {sizes.num_layers} layers; expected 1 to {MAX_LAYERS}")
    for name, size in ref.sizes:
        # Padding rows come and go.
        if name != "vocab_size" and vars(sizes).get(name) != size:
            found = vars(sizes).get(name)
            raise UserError(f"{ref.location}: {name} is {found}, its hub.yaml says {size}; correct it there")
    return config


def load_tokenizer(ref: ModelRef) -> Any:
    from transformers import AutoTokenizer

    tokenizer = hub.explained(
        ref.location,
        ref.revision,
        lambda: AutoTokenizer.from_pretrained(ref.location, revision=ref.revision, trust_remote_code=False),
    )
    if ref.chat_template is not None:
        tokenizer.chat_template = ref.chat_template
    return tokenizer


def load_model(ref: ModelRef, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model in evaluation mode without gradients, from safetensors only and without remote code.

    Args:
        dtype: `auto` keeps the checkpoint's; else float32, float16 or bfloat16.
        device: as torch names it; `auto` shards over the GPUs there are.

    Raises:
        UserError: missing or unreadable files, unsupported architecture, unknown device, weights that are not those of
            the config, NaN in them.
    """
    load_config(ref)
    check_device(device)
    if not ref.is_local:
        hub.warn_unpinned(ref.location, ref.revision)
    model = read_whole(ref, dtype=dtype, device_map=device, use_safetensors=True)
    model.requires_grad_(False)
    return model.eval()


def read_whole(ref: ModelRef, **how: Any) -> Any:
    """The model as transformers reads it with these options, if the checkpoint holds all of its weights.

    Raises:
        UserError: as `load_model`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would report at length is refused below
    try:
        loaded: Any = hub.explained(
            ref.location,
            ref.revision,
            lambda: AutoModelForCausalLM.from_pretrained(
                ref.location,
                revision=ref.revision,
                trust_remote_code=False,
                output_loading_info=True,
                **how,
            ),
        )
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    # What is missing would be random numbers; some old checkpoints hold buffers that are computed nowadays.
    odd = [f"lacks {name}" for name in report["missing_keys"]]
    odd += [f"has {n} too many" for n in report["unexpected_keys"] if "layers." in n and not n.endswith("inv_freq")]
    if odd:
        raise UserError(f"{ref.location}: not the weights that its config.json describes; it {min(odd)}")
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{ref.location}: weight {name} holds NaN or infinity; the checkpoint is broken")
    return model


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine does not have, before anything is loaded."""
    import torch

    if device == "auto":
        return
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        known = "expected cpu, cuda, cuda:N or auto"
        raise UserError(f"device {device!r} cannot be used here ({reason}); {known}") from None


def identity(ref: ModelRef) -> dict[str, str | None]:
    """What goes into an artifact's metadata: the hub name with its commit, or the hash of a folder's weights."""
    if not ref.is_local:
        return {"name": ref.location, "revision": hub.cached_commit(ref.location, ref.revision) or ref.revision}
    return {"name": Path(ref.location).name, "revision": f"sha256:{folder_hash(Path(ref.location))}"}


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's config and weights, hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.name == "config.json" or path.suffix == ".safetensors":
            total.update(path.name.encode())
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def weights_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors in the order of their names, hexadecimal."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
