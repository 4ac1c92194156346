"""What do the source's and the target's base models compute on the same texts? The ground of every transport.

Two models + texts -> a folder: which layers belong together, and for each pair the sums of products of activations,
from which maps between the two are made (METHODS 11); and how alike the two are, a few numbers. Samples are tokens; of
two tokenizers those that end at the same character. No example's answer is used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import PAIRS_AT_ONCE, Device, DType, PairsAtOnce, Source, Stopwatch, Target, option, with_params

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from pkt_stages.models.batches import Batch
    from pkt_stages.models.correlation import Pair, Sums
    from pkt_stages.models.load import ModelRef


@dataclass(frozen=True)
class CorrelateParams:
    """Texts and pairs of layers."""

    num_texts: int = option(200, "The first so many texts.", ge=1)
    max_tokens: int = option(512, "Longer texts are cut, tokens.", ge=4)
    batch_size: int = option(8, "Texts per minibatch.", ge=1)
    layer_pairs: Literal["cka", "proportional", "selected"] = option(
        "cka",
        "Layers that belong together: the most similar ones in order, at the same share of the depth, or the source's"
        " best-scored ones in order, from both models' --attribution.",
    )
    dtype: DType = option("float32", "Dtype of the models as they run; auto: stored.")
    stored: Literal["float64", "float32"] = option("float64", "Dtype of the stored sums.")
    grams: bool = option(False, "Keep either model's own sums of products whole, too, which whitening needs.")


def layer_pairs(
    models: Sequence[Any], batches: Sequence[Sequence[Batch]], rule: str, chosen: list[Pair] | None = None
) -> tuple[list[Pair], Tensor]:
    """(source, target) layers that belong together, and the similarity [source, target] of what all of them add.

    Args:
        chosen: those of the rule `selected`.
    """
    from pkt_stages.core.transport import order_preserving_pairs, proportional_pairs
    from pkt_stages.models.correlation import block_similarity

    similarity = block_similarity(models, batches)
    if chosen is not None:
        return chosen, similarity
    if rule == "proportional":
        return proportional_pairs(*similarity.shape), similarity
    return order_preserving_pairs(similarity), similarity


def selected_pairs(paths: Sequence[Path]) -> list[Pair]:
    """(source, target) layers as `select` pairs them, one answer for all examples (METHODS section 3).

    Args:
        paths: attributions of the source and of the target; their first norm and coefficient count, and of a layer the
            sum of all its neurons' scores, FFN and attention, in the mean over the extract examples.

    Raises:
        UserError: as `artifacts.load`; no extract examples.
    """
    import torch

    from pkt_stages.core.selection import pair_layers

    scores = []
    for path in paths:
        found = artifacts.load(path, artifacts.ATTRIBUTION)
        norm, coefficient = found.meta["params"]["norms"][0], found.meta["params"]["coefficients"][0]
        extract = torch.tensor([example["set"] == "extract" for example in found.meta["examples"]])
        if not bool(extract.any()):
            raise UserError(f"{path}: has no extract examples; run `pkt attribute` with --extract")
        ffn, attn = found[f"ffn_scores.{norm}"], found[f"attn_scores.{norm}.{coefficient}"]
        by_example = ffn[extract].double().sum(-1) + attn[extract].double().sum(-1)
        scores.append(by_example.mean(0, keepdim=True).float())
    return [(int(s), int(t)) for s, t in pair_layers(*scores)[0]]


def run(
    models: Sequence[Any], batches: Sequence[Sequence[Batch]], pairs: Sequence[Pair], at_once: int, *, grams: bool
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


def _check_layers(pairs: Sequence[Pair] | None, refs: Sequence[ModelRef]) -> None:
    """Raise UserError if attributions are of models with more layers than these."""
    from pkt_stages.models.load import load_config
    from pkt_stages.models.sites import geometry

    for side, ref in enumerate(refs):
        layers = geometry(load_config(ref)).num_layers
        if pairs and (largest := max(pair[side] for pair in pairs)) >= layers:
            raise UserError(
                f"--attribution: layer {largest} of the {('source', 'target')[side]} is among the selected,"
                f" {ref.location} has {layers} layers; give the attribution of a model of its shape"
            )


@with_params("correlate", CorrelateParams)
def correlate(
    params: CorrelateParams,
    source: Source,
    target: Target,
    texts: Annotated[Path, typer.Option(help="Texts (.jsonl) from `pkt texts`.")],
    out: Annotated[Path, typer.Option(help="Folder for the sums.")],
    metrics: Annotated[Path | None, typer.Option(help="Where to write how alike they are (JSON).")] = None,
    attribution: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Attributions of the source and of the target, for layer_pairs: selected."),
    ] = None,
    pairs_at_once: PairsAtOnce = PAIRS_AT_ONCE,
    device: Device = "cpu",
) -> None:
    """Sum up what two models compute on the same texts, layer pair by layer pair: the ground of every transport."""
    from pkt_stages.models.correlation import LIST, Correlation, diagnostics, write_pair
    from pkt_stages.models.folding import Folded, check_foldable
    from pkt_stages.models.load import identity, load_config, load_model, resolve
    from pkt_stages.models.texts import paired_minibatches

    watch = Stopwatch()
    artifacts.check_replaceable(out, LIST)
    if (params.layer_pairs == "selected") != (attribution is not None):
        raise UserError(
            f"layer_pairs is {params.layer_pairs}, and --attribution {'is' if attribution else 'is not'} given; give"
            " both models' attributions with layer_pairs: selected, and with no other"
        )
    refs = [resolve(source), resolve(target)]
    chosen = selected_pairs(attribution) if attribution is not None else None
    for ref in refs:
        check_foldable(load_config(ref))
    _check_layers(chosen, refs)
    batches = paired_minibatches(refs, texts, params.num_texts, params.max_tokens, params.batch_size)
    models = [load_model(ref, dtype=params.dtype, device=device) for ref in refs]
    pairs, similarity = layer_pairs(models, batches, params.layer_pairs, chosen)
    num_tokens = sum(int(batch[0].samples().sum()) for batch in batches)
    meta: dict[str, Any] = {
        "source": identity(refs[0]),
        "target": identity(refs[1]),
        "params": asdict(params),
        "pairs": pairs,
        "similarity": similarity.tolist(),
        "num_texts": sum(len(batch[0].ids) for batch in batches),
        "num_tokens": num_tokens,
    }
    said = f"{num_tokens:,} tokens"
    if batches[0][0].places is not None:
        meta["tokens_of"] = [sum(len(ids) for batch in batches for ids in batch[side].ids) for side in range(2)]
        said += " that end at one character in both, of {:,} and {:,}".format(*meta["tokens_of"])
    with artifacts.replaced_folder(out, LIST) as folder:
        for pair, sums in run(models, batches, pairs, pairs_at_once, grams=params.grams):
            write_pair(folder, pair, sums, params.stored, {**meta, "pair": pair})
        artifacts.write_json(folder / LIST, meta)
    said += f", layers {', '.join(f'{s}-{t}' for s, t in pairs)}"
    if metrics is not None:
        source_gain, target_gain = (Folded(ref).gain("head", 0) for ref in refs)
        alike = diagnostics(Correlation(out), (source_gain, target_gain))
        parameters = [sum(weight.numel() for weight in model.parameters()) for model in models]
        alike = {"size_ratio": parameters[0] / parameters[1], **alike}
        artifacts.write_json(metrics, {"diagnostics": alike, **meta})
        said += "; " + ", ".join(f"{name} {value:.3f}" for name, value in alike.items())
    watch.summary("correlate", said, out)
