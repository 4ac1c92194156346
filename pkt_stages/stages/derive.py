"""What becomes of the target without any training? (paper section 3, appendix B.1; METHODS 6)

Models, the source's sub-matrices or another row, as the method's file in pkt_stages/methods takes them -> a row:
changes by label, low-rank, dense or sparse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pkt_stages import artifacts
from pkt_stages.methods import Method
from pkt_stages.options import AnyBase, Device, MethodName, Stopwatch, with_method

if TYPE_CHECKING:
    from pkt_stages.models.derivation import Derived, Inputs


@dataclass(frozen=True)
class DeriveParams:
    """Settings that all such methods share: none; each has its own."""


def run(inputs: Inputs, by: Method) -> Derived:
    """What the method makes of its inputs."""
    derived: Derived = by.code.derive(inputs, by.settings)
    return derived


@with_method("derive", DeriveParams, functions=("derive",))
def derive(
    params: DeriveParams,
    by: Method,
    out: Annotated[Path, typer.Option(help="Folder for the row.")],
    method: MethodName = None,
    target: Annotated[str | None, typer.Option(help="The target: model folder or hub name.")] = None,
    source: Annotated[str | None, typer.Option(help="The source: model folder or hub name.")] = None,
    base: Annotated[str | None, typer.Option(help="What the source's training began with: folder or hub name.")] = None,
    submatrices: Annotated[Path | None, typer.Option(help="From `pkt seek`.")] = None,
    correlation: Annotated[Path | None, typer.Option(help="Folder from `pkt correlate`.")] = None,
    delta: Annotated[Path | None, typer.Option(help="Another row's folder, or a delta.")] = None,
    examples: Annotated[Path | None, typer.Option(help="Folder of examples: <task>/align.jsonl.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts (.jsonl) from `pkt texts`.")] = None,
    any_base: AnyBase = False,
    device: Device = "cpu",
) -> None:
    """Make a row without any training, by a file of pkt_stages/methods; it says what it takes."""
    from pkt_stages.models.changes import LIST, changes_of, read_changes, write_changes
    from pkt_stages.models.derivation import Inputs
    from pkt_stages.models.load import check_device, identity, resolve

    watch = Stopwatch()
    artifacts.check_replaceable(out, LIST)
    check_device(device)
    of = resolve(target) if target is not None else None
    row = None
    if delta is not None:
        row = read_changes(delta) if of is None else changes_of(delta, identity(of), any_base=any_base)
    inputs = Inputs(
        target=of,
        source=resolve(source) if source is not None else None,
        base=resolve(base) if base is not None else None,
        submatrices=submatrices,
        correlation=correlation,
        delta=row,
        examples=examples,
        texts=texts,
        device=device,
    )
    made = run(inputs, by)
    meta = {"command": "derive", "method": method, "target": made.target, "source": made.source, "params": by.facts()}
    write_changes(out, made.changes, {**made.meta, **meta})
    settings = ", ".join(f"{name} {value}" for name, value in asdict(by.settings).items())
    watch.summary("derive", f"{by.name} ({settings}), {len(made.changes)} change{'s'[: len(made.changes) != 1]}", out)
