"""Do two models compute alike? Linear CKA of every layer of one with every layer of the other (METHODS section 7).

Texts + two models (the second with a delta or adapter in it, if given) -> `cka`: per site a [first layer, second layer]
map of similarities between the outputs of up_proj, down_proj, v_proj and o_proj. One forward pass per model and
minibatch; memory does not grow with the number of texts. The paper's ethological similarity (section 5.3, figure 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch, option, with_params
from pkt_stages.parallel import Group, joined

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["mean", "last", "all", "per_sequence"]


@dataclass(frozen=True)
class CkaParams:
    """Settings of the comparison."""

    reduction: Reduction = option(
        "mean", "Samples: each text's mean token, its last, all tokens, or per_sequence (a minibatch per text)."
    )
    num_texts: int = option(200, "Texts compared, the first of the file; fewer there are an error.")
    batch_size: int = option(200, "Texts per minibatch of HSIC, at least 4; per_sequence ignores it.")
    max_tokens: int | None = option(None, "Texts are cut after so many tokens; None: one over the context is an error.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        for name in ("num_texts", "batch_size"):
            if getattr(self, name) < 4:
                raise ValueError(f"{name} must be at least 4, which unbiased HSIC needs, found {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {self.max_tokens}")


def run(
    models: Sequence[Any],
    texts: Sequence[list[list[int]]],
    params: CkaParams,
    *,
    micro_batch_size: int,
    group: Group | None = None,
) -> dict[str, Tensor]:
    """CKA by site, [first layer, second layer] float64.

    Args:
        models: two of them.
        texts: the token ids of the same texts, for either model.
        group: the processes that divide a minibatch's forward passes.

    Raises:
        UserError: too few samples, or a layer whose features do not vary.
    """
    from pkt_stages.core.similarity import CkaSums, minibatches
    from pkt_stages.models.sites import SITES
    from pkt_stages.progress import track

    group = group or Group()
    places = range(len(texts[0]))
    per_text = params.reduction == "per_sequence"
    batches = [range(i, i + 1) for i in places] if per_text else minibatches(len(places), params.batch_size)
    sums = {site: CkaSums() for site in SITES}
    for batch in track(batches, "minibatches"):
        try:
            first, second = (
                grams(model, [own[i] for i in batch], params.reduction, micro_batch_size, group)
                for model, own in zip(models, texts, strict=True)
            )
        except ValueError as error:
            raise UserError(f"text {batch[0] + 1}: {error}; use longer texts, or more per minibatch") from None
        for site in SITES:
            sums[site].add(first[site], second[site].to(first[site].device))
    similarity = {}
    for site in SITES:
        try:
            similarity[site] = sums[site].cka().cpu()
        except ValueError as error:
            raise UserError(f"{site}: {error}; use other texts") from None
    return similarity


def grams(
    model: Any, texts: Sequence[list[int]], reduction: Reduction, micro_batch_size: int, group: Group
) -> dict[str, Tensor]:
    """Centred Gram matrices of one minibatch by site, [layer, sample, sample] float64; one pass through the model.

    Samples are ordered by process; CKA does not depend on their order, if it is the same for either model.
    """
    import torch

    from pkt_stages.core.similarity import centred_gram
    from pkt_stages.models.features import features
    from pkt_stages.models.losses import home

    tokens = "all" if reduction == "per_sequence" else reduction
    mine = group.share(texts)
    found = features(model, mine, tokens=tokens, micro_batch_size=micro_batch_size) if mine else {}
    if group.size > 1:
        parts = [p for p in group.gather({s: [t.cpu() for t in layers] for s, layers in found.items()}) if p]
        found = {
            site: [torch.cat(layer).to(home(model)) for layer in zip(*(part[site] for part in parts), strict=True)]
            for site in parts[0]
        }
    return {
        site: torch.stack([centred_gram(layer).to(home(model)) for layer in outputs]) for site, outputs in found.items()
    }


@with_params("cka", CkaParams)
def cka(
    params: CkaParams,
    first: Annotated[str, typer.Option(help="The first model's folder or hub name: rows of the map.")],
    second: Annotated[str, typer.Option(help="The second model's folder or hub name: columns of the map.")],
    texts: Annotated[Path, typer.Option(help="Texts (.jsonl with the key `text`).")],
    out: Annotated[Path, typer.Option(help="Where to write the similarities (.safetensors).")],
    metrics: Annotated[Path, typer.Option(help="Where to write them for the report (JSON).")],
    delta: Annotated[
        Path | None, typer.Option(help="Delta, PEFT adapter, or a folder of them, merged into the second model.")
    ] = None,
    run_number: Annotated[int, typer.Option("--run", min=0, help="Which one of a folder, from 0.")] = 0,
    first_revision: Annotated[str | None, typer.Option(help="The first model's hub revision (commit hash).")] = None,
    revision: Annotated[str | None, typer.Option(help="The second model's hub revision (commit hash).")] = None,
    dtype: Annotated[str, typer.Option(help="auto (stored), float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    micro_batch_size: Annotated[
        int, typer.Option(min=1, help="Texts per forward pass; changes memory.", envvar="PKT_MICRO_BATCH")
    ] = 8,
) -> None:
    """Compare what two models compute on the same texts: CKA of their layers, site by site.

    Several processes (torchrun) divide the texts, each with both models.
    """
    from pkt_stages import artifacts
    from pkt_stages.models import load
    from pkt_stages.models.inject import merged
    from pkt_stages.models.runs import labelled, load_run

    watch = Stopwatch()
    refs = [load.resolve(first, first_revision), load.resolve(second, revision)]
    raw = read_texts(texts, params.num_texts)
    encoded = [encode_texts(ref, raw, texts, params) for ref in refs]
    if params.reduction in ("all", "per_sequence"):
        for number, (one, other) in enumerate(zip(*encoded, strict=True), start=1):
            if len(one) != len(other):
                raise UserError(
                    f"{texts}: text {number} has {len(one)} tokens for {first} and {len(other)} for {second}; with"
                    f" reduction {params.reduction} tokens are samples and must be the same; use mean or last"
                )
    change, label = None, None
    if delta is not None:
        runs = labelled([delta])
        if run_number >= len(runs):
            raise UserError(f"{delta}: has {len(runs)} runs, no number {run_number} (from 0)")
        label = list(runs)[run_number]
        change = load_run(runs[label])
    with joined() as group:
        device = group.device(device)
        load.check_device(device)
        models = [load.load_model(ref, dtype=dtype, device=device) for ref in refs]
        with merged(models[1], change) if change is not None else nullcontext():
            found = run(models, encoded, params, micro_batch_size=micro_batch_size, group=group)
        if not group.is_first:
            return
    meta: dict[str, Any] = {
        "first": load.identity(refs[0]),
        "second": load.identity(refs[1]),
        "run": label,
        "params": asdict(params),
        "num_tokens": sum(map(len, encoded[0])),
    }
    artifacts.save(out, "cka", {f"cka.{site}": similarity for site, similarity in found.items()}, meta)
    artifacts.write_json(metrics, {"cka": {site: similarity.tolist() for site, similarity in found.items()}, **meta})
    means = ", ".join(f"{site} {float(similarity.mean()):.2f}" for site, similarity in found.items())
    watch.summary("cka", f"mean over layer pairs: {means}, on {len(raw)} texts", out)


def read_texts(path: Path, count: int) -> list[str]:
    """The first `count` texts of a file.

    Raises:
        UserError: fewer, or a line without text.
    """
    from pkt_stages.examples import read_rows

    found = []
    for number, row in read_rows(path):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise UserError(f"{path}:{number}: expected a key `text` that is not empty, found {sorted(row)}")
        found.append(row["text"])
    if len(found) < count:
        raise UserError(f"{path}: {len(found)} texts, {count} wanted (num_texts)")
    return found[:count]


def encode_texts(ref: Any, texts: Sequence[str], path: Path, params: CkaParams) -> list[list[int]]:
    """Token ids of each text with BOS, cut to `max_tokens`; UserError for one that does not fit into the context."""
    from pkt_stages.encoding import tokenize
    from pkt_stages.models.load import load_config, load_tokenizer

    tokenizer = load_tokenizer(ref)
    limit = getattr(load_config(ref), "max_position_embeddings", None) or 2**31
    encoded = [tokenize(tokenizer, text)[0][: params.max_tokens] for text in texts]
    for number, ids in enumerate(encoded, start=1):
        if len(ids) > limit:
            raise UserError(
                f"{path}: text {number} has {len(ids)} tokens, {ref.location} takes {limit}; set max_tokens to cut it"
            )
    return encoded
