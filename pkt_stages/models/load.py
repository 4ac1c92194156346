"""Loading models and tokenizers from a local folder, a folder that points to the hub, or a hub name."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages import hub
from pkt_stages.artifacts import is_finite
from pkt_stages.errors import UserError, shown
from pkt_stages.models.sites import Geometry, family, geometry
from pkt_stages.params import build

if TYPE_CHECKING:
    import torch

    from pkt_stages.models.rows import Checkpoint

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
HASHED = "sha256:"  # how the revision of a local model begins, which is its content
# What config.json has where weights are quantised: transformers', its older name for compressed tensors, and MLX's.
QUANTISATION = ("quantization_config", "compression_config", "quantization")
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
        UserError: a path that does not exist, a pointer that is malformed or has sizes that are not those of a
            geometry, a folder with an adapter, or one that holds something else than files.
    """
    folder = Path(model)
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        # Whoever opens a pipe waits for ever.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: a pipe, socket or device; a model's folder may hold files alone")
    pointer = folder / hub.POINTER
    if pointer.is_file():
        named = hub.read_model_pointer(pointer)
        if named.sizes:
            _check_sizes(pointer, named.sizes)
        template = folder / CHAT_TEMPLATE
        try:
            text = template.read_text(encoding="utf-8") if template.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{template}: not readable as text ({error})") from None
        return ModelRef(named.repo, named.revision, text, tuple(sorted(named.sizes.items())))
    if folder.is_dir():
        if (folder / ADAPTER).is_file():
            raise UserError(
                f"{model}: holds an adapter ({ADAPTER}), which would change the model unseen; give the base model's"
                " folder, and the adapter as --delta"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{model}: a folder without config.json; expected a Hugging Face model folder")
        return ModelRef(model)
    name, at, revision = model.partition("@")
    if not hub.is_repo_name(name) or (at and not revision):
        raise UserError(f"{model}: no such folder, and not a hub name of the form owner/name or owner/name@revision")
    return ModelRef(name, revision or None)


def _check_sizes(pointer: Path, sizes: Mapping[str, int]) -> None:
    """Raise UserError unless these are a geometry's sizes, all of them."""
    build(Geometry, sizes, f"{pointer}: sizes")
    if small := [name for name, size in sizes.items() if size < 1]:
        raise UserError(f"{pointer}: sizes: {small[0]}: expected a number above 0, found {shown(sizes[small[0]])}")


def load_config(ref: ModelRef) -> Any:
    """The model's config; only supported architectures and sizes get through, none that bring code, none quantised.

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
            f"{ref.location}: its config.json asks for code of its own (auto_map), which is never run; where"
            f" transformers' own class of architecture {config.model_type!r} is meant, take the key out of a copy"
        )
    for name in QUANTISATION:
        if found := getattr(config, name, None):
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise UserError(
                f"{ref.location}: its config.json says that its weights are quantised ({name}:"
                f" {shown(method or found)}), which no stage reads; use the model that was quantised"
            )
    if getattr(config, "transformers_weights", None):
        raise UserError(
            f"{ref.location}: its config.json names a file of its own for the weights (transformers_weights); call it"
            " model.safetensors and take the key out"
        )
    try:
        sizes = hub.explained(ref.location, ref.revision, lambda: geometry(config))
    except UserError as error:
        said = str(error)
        raise UserError(said if said.startswith(ref.location) else f"{ref.location}: {said}") from None
    if not 1 <= sizes.num_layers <= MAX_LAYERS:
        raise UserError(f"{ref.location}: {sizes.num_layers} layers; expected 1 to {MAX_LAYERS}")
    for name, size in ref.sizes:
        # Padding rows come and go.
        if name != "vocab_size" and vars(sizes).get(name) != size:
            found = vars(sizes).get(name)
            raise UserError(f"{ref.location}: {name} is {found}, its hub.yaml says {shown(size)}; correct it there")
    return config


def load_tokenizer(ref: ModelRef) -> Any:
    """The model's tokenizer, with the reference's chat template.

    Raises:
        UserError: it cannot be loaded or used, has no EOS token, or tokens that the embedding has no row for.
    """
    from transformers import AutoTokenizer

    num_rows = load_config(ref).vocab_size

    def load() -> Any:
        found = AutoTokenizer.from_pretrained(ref.location, revision=ref.revision, trust_remote_code=False)
        found("1", return_offsets_mapping=True)  # some settings fail at their first use only
        return found

    tokenizer = hub.explained(ref.location, ref.revision, load, "the tokenizer")
    if ref.chat_template is not None:
        tokenizer.chat_template = ref.chat_template
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{ref.location}: its tokenizer has no EOS token, which ends every answer; name it in tokenizer_config.json"
            " (eos_token)"
        )
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= num_rows}
    for token, number in sorted(beyond.items(), key=lambda pair: pair[1]):
        if _is_used(tokenizer, token):
            raise UserError(
                f"{ref.location}: token {shown(token)} of its tokenizer is number {number}, its embedding has"
                f" {num_rows} rows; give it the tokenizer that it was trained with"
            )
    return tokenizer


def vocabulary_difference(first: ModelRef, second: ModelRef) -> str | None:
    """The first token that two models do not have with the same number; None if they have the same tokens.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizers = [load_tokenizer(ref) for ref in (first, second)]
    return odd_token(tokenizers, (f"for {first.location}", f"for {second.location}"))


def odd_token(tokenizers: Sequence[Any], sides: tuple[str, str]) -> str | None:
    """The same of two tokenizers, which the text calls by their `sides` (`in the source`)."""
    one, other = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if one == other:
        return None
    token, _ = min(one.items() ^ other.items(), key=lambda pair: (pair[1], pair[0]))
    told = [
        f"{found.get(token, 'none')} of {len(found)} {side}" for found, side in zip((one, other), sides, strict=True)
    ]
    return f"token {shown(token)} is number {', '.join(told)}"


def _is_used(tokenizer: Any, token: str) -> bool:
    """Whether a token can come up: all but special ones that neither end nor pad nor stand in the chat template."""
    special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return token not in special or token in named or token in str(tokenizer.chat_template)


def load_model(ref: ModelRef, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model in evaluation mode without gradients, from safetensors only and without remote code.

    Args:
        dtype: `auto` keeps the stored weights' (of several the one that holds them all); else float32, float16 or
            bfloat16.
        device: as torch names it; `auto` shards over the GPUs there are.

    Raises:
        UserError: as `Checkpoint`, unknown device, NaN in the weights, or a generation config that is malformed.
    """
    import torch

    from pkt_stages.models.rows import Checkpoint

    check_device(device)
    if not ref.is_local:
        hub.warn_unpinned(ref.location, ref.revision)
    checkpoint = Checkpoint(ref)
    wanted = checkpoint.dtype if dtype == "auto" else getattr(torch, dtype)
    if wanted == torch.float64:
        raise UserError(f"{ref.location}: stored as float64, in which no model computes here; choose --dtype float32")
    model = put_together(ref, checkpoint, wanted, device)
    model.requires_grad_(False)
    return model.eval()


def put_together(ref: ModelRef, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """The model of a checkpoint's weights.

    Raises:
        UserError: as `load_model`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    softcap = family(checkpoint.config).attention_softcap
    capped = softcap is not None and getattr(checkpoint.config, softcap) is not None
    try:
        loaded: Any = hub.explained(
            ref.location,
            ref.revision,
            lambda: checkpoint.model_class.from_pretrained(
                None,
                config=checkpoint.config,
                state_dict=checkpoint.weights,
                dtype=dtype,
                device_map=device,
                attn_implementation="eager" if capped else None,
                output_loading_info=True,
            ),
        )
        model, report = loaded
        model.generation_config = _generation_config(ref, model)
    finally:
        logging.set_verbosity(verbosity)
    assert not report["missing_keys"] and not report["unexpected_keys"], report  # the checkpoint was checked
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise UserError(f"{ref.location}: weight {name} holds NaN or infinity; the checkpoint is broken")
    return model


def _generation_config(ref: ModelRef, model: Any) -> Any:
    """The generation config in its own file, or what follows from the model's config.

    Raises:
        UserError: the file is malformed, or the tokens that end an answer are none of the vocabulary.
    """
    from transformers import GenerationConfig

    from pkt_stages.models.rows import file_of, read_object

    path, found = file_of(ref, GENERATION), model.generation_config
    if path is not None:
        content = read_object(path)
        found = hub.explained(
            ref.location, ref.revision, lambda: GenerationConfig.from_dict(content), "the generation config"
        )
    ends = found.eos_token_id
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < model.config.vocab_size:
            raise UserError(
                f"{path or ref.location}: eos_token_id: expected tokens below {model.config.vocab_size}, found"
                f" {shown(end)}"
            )
    return found


def save_model(model: Any, ref: ModelRef, folder: Path, *, shard: str | None = None) -> None:
    """Write a model as a complete folder: weights (safetensors) and config, and what `save_beside` takes from `ref`.

    Args:
        shard: how much a file of weights holds at most, as `5GB`; None: transformers' own limit.
    """
    from transformers import GenerationConfig

    # transformers reads generation configs that it refuses to write, as that of Llama-2 (temperature, but no sampling).
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard is not None else {}))
    finally:
        model.generation_config = own
    (folder / GENERATION).unlink()
    save_beside(ref, folder)


def save_beside(ref: ModelRef, folder: Path) -> None:
    """Put a model's tokenizer beside weights, and its generation config, byte for byte, if it has one."""
    from pkt_stages.models.rows import file_of

    load_tokenizer(ref).save_pretrained(folder)
    generation = file_of(ref, GENERATION)
    if generation is not None:
        shutil.copyfile(generation, folder / GENERATION)


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
    return {"name": Path(ref.location).name, "revision": f"{HASHED}{folder_hash(Path(ref.location))}"}


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities are of the same weights: of folders by their hash, whatever they are called."""
    if one.get("revision") != other.get("revision"):
        return False
    return str(one.get("revision")).startswith(HASHED) or one.get("name") == other.get("name")


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's config and weights, hexadecimal.

    Of the files that are read, and no others that lie beside them.
    """
    from pkt_stages.models.rows import weight_files

    total = hashlib.sha256()
    paths = sorted([folder / "config.json", *weight_files(ModelRef(str(folder)))])
    with ThreadPoolExecutor() as pool:  # disks are faster than sums
        for path, digest in zip(paths, pool.map(_digest, paths), strict=True):
            total.update(path.name.encode())
            total.update(digest)
    return total.hexdigest()


def _digest(path: Path) -> bytes:
    stat = path.stat()
    return _digest_once(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.cache
def _digest_once(path: Path, _size: int, _modified: int, _inode: int) -> bytes:
    """SHA-256 of a file, read once in a process unless it changes: whose weights these are is asked at every door."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def weights_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors in the order of their names, hexadecimal."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)  # not a copy of it
    return total.hexdigest()
