"""Do two models compute alike, how large is what sets them apart, what does it resemble? (paper 5.3; METHODS 7)

Texts + two models, the second with a row's change in it if one is given -> `cka`: per site a map [first layer, second
layer]; `delta_ranges` of the change, or of second - first where they have the same weights; `similarity` of an adapter
to the weights that it was trained on, where its row says what it started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import AnyBase, Device, DType, MicroBatch, Stopwatch, option, with_params
from pkt_stages.parallel import Group, joined

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.batches import Batch
    from pkt_stages.models.changes import Change
    from pkt_stages.models.load import ModelRef


@dataclass(frozen=True)
class CompareParams:
    """Settings of the comparison."""

    reduction: Literal["mean", "last", "all", "per_sequence"] = option(
        "mean",
        "Samples: each text's mean token, its last, all tokens (of two tokenizers those that end at one character), or"
        " per_sequence (a minibatch per text).",
    )
    num_texts: int = option(200, "Texts compared, the first of the file; fewer there are an error.", ge=4)
    batch_size: int = option(200, "Texts per minibatch of HSIC; per_sequence ignores it.", ge=4)
    max_tokens: int | None = option(
        None, "Texts are cut after so many tokens; None: one over the context is an error.", ge=1
    )
    dtype: DType = option("auto", "Dtype of the models; auto: stored.")


def run(
    refs: Sequence[ModelRef],
    texts: Sequence[Batch],
    change: Change | None,
    params: CompareParams,
    *,
    device: str,
    micro_batch_size: int,
    group: Group,
) -> dict[str, Tensor]:
    """CKA by site of two models, the second with the change in it, on the same texts as either reads them."""
    from pkt_stages.models.cka import cka
    from pkt_stages.models.load import load_model
    from pkt_stages.models.merge import merged

    models = [load_model(ref, dtype=params.dtype, device=device) for ref in refs]
    with merged(models[1], change) if change is not None else nullcontext():
        return cka(
            models,
            texts,
            reduction=params.reduction,
            batch_size=params.batch_size,
            micro_batch_size=micro_batch_size,
            group=group,
        )


@with_params("compare", CompareParams)
def compare(
    params: CompareParams,
    first: Annotated[str, typer.Option(help="The first model: folder, or hub name. Rows of the maps.")],
    texts: Annotated[Path, typer.Option(help="Texts (.jsonl with the key `text`).")],
    out: Annotated[Path, typer.Option(help="Folder for maps, ranges and similarities (.safetensors).")],
    metrics: Annotated[Path, typer.Option(help="Where to write them for the report (JSON).")],
    second: Annotated[str | None, typer.Option(help="The second model (default, with --delta: the first).")] = None,
    delta: Annotated[Path | None, typer.Option(help="Row, adapter or delta to put into the second.")] = None,
    which: Annotated[str, typer.Option("--run", help="Which change of a row, by label or number from 0.")] = "0",
    base: Annotated[
        str | None, typer.Option(help="Model that both went on from: are the two changes alike, layer by layer?")
    ] = None,
    submatrices: Annotated[Path | None, typer.Option(help="From `pkt seek`, for an adapter of init seeking.")] = None,
    any_base: AnyBase = False,
    device: Device = "cpu",
    micro_batch_size: MicroBatch = 8,
) -> None:
    """Compare two models, or the target before and after a method: CKA, ranges of the delta, similarity of an adapter.

    Several processes (torchrun) divide the texts, each with both models.
    """
    from pkt_stages.models import load
    from pkt_stages.models.batches import Batch
    from pkt_stages.models.changes import changes_of
    from pkt_stages.models.comparison import MARK, Comparison, alike, changes_from, ranges_of, similarity_of, start_of
    from pkt_stages.models.texts import encode_texts, paired_texts, read_texts

    watch = Stopwatch()
    artifacts.check_replaceable(out, MARK)
    if delta is None and (second is None or submatrices is not None):
        raise UserError("--submatrices goes with --delta" if second is not None else "give --second, --delta, or both")
    if base is not None and (second is None or delta is not None):
        raise UserError("--base goes with --second, and without --delta: it asks about two models")
    refs = [load.resolve(first), load.resolve(second or first)]
    models = {ref: load.identity(ref) for ref in refs}
    origin = load.resolve(base) if base is not None else None
    changes = changes_from(origin, refs) if origin is not None else None
    row = stored = change = start = None
    if delta is not None:
        row = changes_of(delta, models[refs[1]], any_base=any_base)
        stored = row.one(which)
        change, start = stored.load(), start_of(row, stored, submatrices, models[refs[1]])
    if params.reduction in ("all", "per_sequence"):
        encoded = paired_texts(refs, texts, params.num_texts, params.max_tokens)
    else:
        raw = read_texts(texts, params.num_texts)
        encoded = [Batch(encode_texts(ref, raw, texts, params.max_tokens)) for ref in refs]
    with joined() as group:
        device = group.device(device)
        maps = run(refs, encoded, change, params, device=device, micro_batch_size=micro_batch_size, group=group)
        if not group.is_first:
            return
    deltas = alike(*changes) if changes is not None else None
    found = Comparison(maps, ranges_of(refs, change), similarity_of(refs[1], change, start), deltas)
    meta = {
        "first": models[refs[0]],
        "second": models[refs[1]],
        "base": load.identity(origin) if origin is not None else None,
        "run": stored.label if stored is not None else None,
        "made": row.made() if row is not None else None,
        "params": asdict(params),
        "num_tokens": int(encoded[0].samples().sum()),
    }
    found.write(out, meta)
    artifacts.write_json(metrics, found.facts() | meta)
    watch.summary("compare", f"{found.summary()}; {params.num_texts} texts", out)
