"""What becomes of the target without any training? (paper section 3, appendix B.1; METHODS 6)

Models, the source's sub-matrices or another row, as the method's file in pkt_stages/methods takes them -> a row:
changes by label, low-rank, dense or sparse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.methods import Method
from pkt_stages.options import AnyBase, Device, MethodName, Stopwatch, option, with_method

if TYPE_CHECKING:
    from pkt_stages.models.derivation import Derived, Inputs


@dataclass(frozen=True)
class DeriveParams:
    """Settings that all such methods share."""

    stored: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Dtype of whole weights in the row's files; what rounding loses of a change is noted down."
    )


def run(inputs: Inputs, by: Method) -> Derived:
    """What the method makes of its inputs."""
    derived: Derived = by.code.derive(inputs, by.settings)
    return derived


def as_stored(derived: Derived, dtype: str) -> tuple[Derived, dict[str, dict[str, Any]]]:
    """The row with its whole weights in this dtype, and what rounding lost of each change, by label.

    Raises:
        UserError: over half of a change's norm would be lost, or a change is not of whole weights.
    """
    from pkt_stages.models.changes import DenseDelta, rounded
    from pkt_stages.models.merge import ROUNDING_REFUSE, ROUNDING_WARN

    made, facts = {}, {}
    for label, change in derived.changes.items():
        if not isinstance(change, DenseDelta):
            raise UserError(f"stored {dtype}: the change {label!r} is not of whole weights; leave it float32")
        made[label], loss = rounded(change, dtype)
        if not loss <= ROUNDING_REFUSE:
            raise UserError(
                f"stored {dtype}: rounding would lose {loss:.0%} of the norm of the change {label!r} (limit"
                f" {ROUNDING_REFUSE:.0%}); use float32"
            )
        if loss > ROUNDING_WARN:
            typer.echo(f"warning: {label}: stored as {dtype}, which loses {loss:.1%} of the change's norm", err=True)
        facts[label] = {"rounding_loss": loss}
    return replace(derived, changes=made), facts


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
    gradients: Annotated[Path | None, typer.Option(help="Folder from `pkt gradients`.")] = None,
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
        gradients=gradients,
        delta=row,
        examples=examples,
        texts=texts,
        device=device,
    )
    made = run(inputs, by)
    facts: dict[str, dict[str, Any]] = {}
    if params.stored != "float32":
        made, facts = as_stored(made, params.stored)
    meta = {"command": "derive", "method": method, "target": made.target, "source": made.source}
    meta |= {"params": by.facts() | asdict(params)}
    write_changes(out, made.changes, {**made.meta, **meta}, facts)
    settings = ", ".join(f"{name} {value}" for name, value in asdict(by.settings).items())
    watch.summary("derive", f"{by.name} ({settings}), {len(made.changes)} change{'s'[: len(made.changes) != 1]}", out)
