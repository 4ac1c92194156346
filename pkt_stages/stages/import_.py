"""An adapter that somebody trained elsewhere as a row of the table, to be evaluated like any other.

A LoRA adapter in PEFT's format, or a folder of several (seeds, say) + the target -> a row: a change for each. Only what
is W + (lora_alpha / r) B A of the target's own weights is taken (`models/adapters.py`); it must fit the target in names
and shapes, and be of that base by its own word.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import MethodName, Stopwatch, Target, option, with_params

if TYPE_CHECKING:
    from pkt_stages.models.adapters import Adapter


@dataclass(frozen=True)
class ImportParams:
    """How much an adapter must say of its base."""

    any_base: bool = option(False, "Take an adapter that names another base model, if its shapes fit.")


def run(folders: list[Path], config: Any, base: dict[str, Any], *, any_base: bool) -> dict[str, Adapter]:
    """The adapters by the names of their folders.

    Args:
        config: the target's.
        base: its identity.

    Raises:
        UserError: an adapter that is not plain LoRA, does not fit the target, or names another base.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pkt_stages.models.adapters import load_adapter
    from pkt_stages.models.changes import changes_of
    from pkt_stages.models.merge import check

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {}
    for folder in folders:
        adapter = load_adapter(folder)
        changes_of(folder, base, any_base=any_base)
        try:
            check(model, adapter)
        except UserError as error:
            raise UserError(f"{folder}: does not fit the target {base['name']}: {error}") from None
        found[folder.name] = adapter
    return found


@with_params("import", ImportParams)
def import_(
    params: ImportParams,
    adapter: Annotated[Path, typer.Option(help="Folder of a PEFT LoRA adapter, or of folders with one each.")],
    target: Target,
    out: Annotated[Path, typer.Option(help="Folder for the row.")],
    method: MethodName = None,
) -> None:
    """Make a row of a LoRA adapter from elsewhere."""
    from pkt_stages.models.adapters import is_adapter
    from pkt_stages.models.changes import LIST, write_changes
    from pkt_stages.models.load import identity, load_config, resolve

    watch = Stopwatch()
    artifacts.check_replaceable(out, LIST)
    inside = sorted(adapter.iterdir()) if adapter.is_dir() else []
    folders = [adapter] if is_adapter(adapter) else [folder for folder in inside if is_adapter(folder)]
    if not folders:
        raise UserError(f"{adapter}: no PEFT adapter (adapter_config.json), and no folder with one in it")
    ref = resolve(target)
    config, base = load_config(ref), identity(ref)
    adapters = run(folders, config, base, any_base=params.any_base)
    meta = {"command": "import", "method": method, "target": base, "source": None, "params": asdict(params)}
    write_changes(out, adapters, meta)
    ranks = ", ".join(sorted({str(one.rank) for one in adapters.values()}))
    watch.summary("import", f"{len(adapters)} adapter{'s'[: len(adapters) != 1]} of rank {ranks}", out)
