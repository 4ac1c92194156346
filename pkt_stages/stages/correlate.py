"""What do the source's and the target's base models compute on the same texts? The ground of every transport.

Two models with one tokenizer + texts -> a folder: which layers belong together, and for each pair the sums of products
of activations, from which maps between the two are made (METHODS 11). No example's answer is used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import Device, DType, Source, Stopwatch, Target, option, with_params

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from pkt_stages.models.correlation import Pair, Sums


PAIRS_AT_ONCE = 8


@dataclass(frozen=True)
class CorrelateParams:
    """Texts and pairs of layers."""

    num_texts: int = option(200, "The first so many texts.", ge=1)
    max_tokens: int = option(512, "Longer texts are cut, tokens.", ge=4)
    batch_size: int = option(8, "Texts per minibatch.", ge=1)
    layer_pairs: Literal["cka", "proportional"] = option(
        "cka", "Layers that belong together: the most similar ones in order, or at the same share of the depth."
    )
    dtype: DType = option("float32", "Dtype of the models as they run; auto: stored.")
    stored: Literal["float64", "float32"] = option("float64", "Dtype of the stored sums.")
    grams: bool = option(False, "Keep either model's own sums of products whole, too, which whitening needs.")


def layer_pairs(models: Sequence[Any], batches: Sequence[Sequence[list[int]]], rule: str) -> tuple[list[Pair], Tensor]:
    """(source, target) layers that belong together, and the similarity [source, target] of what all of them add."""
    from pkt_stages.core.transport import order_preserving_pairs, proportional_pairs
    from pkt_stages.models.correlation import block_similarity

    similarity = block_similarity(models, batches)
    if rule == "proportional":
        return proportional_pairs(*similarity.shape), similarity
    return order_preserving_pairs(similarity), similarity


def run(
    models: Sequence[Any], batches: Sequence[Sequence[list[int]]], pairs: Sequence[Pair], at_once: int, *, grams: bool
) -> Iterator[tuple[Pair | None, dict[str, Sums]]]:
    """Sums by pair, some pairs at a time, each from a pass over all texts; None: in front of the head.

    Args:
        models: source and target.
        at_once: pairs whose sums are held at a time.
    """
    from pkt_stages.models.correlation import correlate

    for start in range(0, len(pairs), at_once):
        for pair, sums in correlate(models, batches, pairs[start : start + at_once], grams=grams).items():
            if pair is not None or start == 0:
                yield pair, sums


@with_params("correlate", CorrelateParams)
def correlate(
    params: CorrelateParams,
    source: Source,
    target: Target,
    texts: Annotated[Path, typer.Option(help="Texts (.jsonl) from `pkt texts`.")],
    out: Annotated[Path, typer.Option(help="Folder for the sums.")],
    pairs_at_once: Annotated[
        int, typer.Option(min=1, help="Pairs of layers whose sums are held at a time.", envvar="PKT_PAIRS_AT_ONCE")
    ] = PAIRS_AT_ONCE,
    device: Device = "cpu",
) -> None:
    """Sum up what two models compute on the same texts, layer pair by layer pair: the ground of every transport."""
    from pkt_stages.models.correlation import LIST, write_pair
    from pkt_stages.models.load import identity, load_model, resolve
    from pkt_stages.models.texts import encode_texts, read_texts

    watch = Stopwatch()
    artifacts.check_replaceable(out, LIST)
    refs = [resolve(source), resolve(target)]
    raw = read_texts(texts, params.num_texts)
    ids = [encode_texts(ref, raw, texts, params.max_tokens) for ref in refs]
    if ids[0] != ids[1]:
        raise UserError(f"{texts}: the two models' tokenizers divide them differently; transport needs equal tokens")
    models = [load_model(ref, dtype=params.dtype, device=device) for ref in refs]
    batches = [ids[0][start : start + params.batch_size] for start in range(0, len(ids[0]), params.batch_size)]
    pairs, similarity = layer_pairs(models, batches, params.layer_pairs)
    num_tokens = sum(map(len, ids[0]))
    meta: dict[str, Any] = {
        "source": identity(refs[0]),
        "target": identity(refs[1]),
        "params": asdict(params),
        "pairs": pairs,
        "similarity": similarity.tolist(),
        "num_texts": len(ids[0]),
        "num_tokens": num_tokens,
    }
    with artifacts.replaced_folder(out, LIST) as folder:
        for pair, sums in run(models, batches, pairs, pairs_at_once, grams=params.grams):
            write_pair(folder, pair, sums, params.stored, {**meta, "pair": pair})
        artifacts.write_json(folder / LIST, meta)
    shown = ", ".join(f"{s}-{t}" for s, t in pairs)
    watch.summary("correlate", f"{num_tokens:,} tokens, layers {shown}", out)
