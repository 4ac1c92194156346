"""What do the same answers ask of the source's and the target's base models? The ground of BiCo (METHODS 11.4).

Two models with one tokenizer + all tasks' align examples + the layer pairs of a correlation -> a folder: for each pair
the sums of products of the loss's gradients at the outputs of projections. One forward and backward pass of both models
for every `--pairs-at-once` pairs. At 13B -> 7B a pair takes 3.6 GB in float64, most of it gate and up [13824, 11008].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.encoding import EncodingParams
from pkt_stages.errors import UserError
from pkt_stages.options import PAIRS_AT_ONCE, Device, PairsAtOnce, Source, Stopwatch, Target, option, with_params

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pkt_stages.encoding import Encoded
    from pkt_stages.models.correlation import Pair, Sums
    from pkt_stages.models.load import ModelRef


@dataclass(frozen=True)
class GradientsParams(EncodingParams):
    """Examples."""

    num_examples: int | None = option(None, "The first so many align examples of each task; None: all.", ge=1)
    batch_size: int = option(4, "Examples per minibatch.", ge=1)
    # Gradients of 1e-7 and less are nothing to float16.
    dtype: Literal["float32", "bfloat16"] = option("float32", "Dtype of the models as they run.")
    stored: Literal["float64", "float32"] = option("float64", "Dtype of the stored sums.")
    grams: bool = option(False, "Keep either model's own sums of products whole, too, which whitening needs.")


def run(
    models: Sequence[Any], batches: Sequence[Sequence[Encoded]], pairs: Sequence[Pair], at_once: int, *, grams: bool
) -> Iterator[tuple[Pair, dict[str, Sums]]]:
    """Sums by pair, some pairs at a time, each from a pass over all examples.

    Args:
        models: source and target.
        at_once: pairs whose sums are held at a time.
    """
    from pkt_stages.models.gradients import gradient_sums

    for start in range(0, len(pairs), at_once):
        yield from gradient_sums(models, batches, pairs[start : start + at_once], grams=grams).items()


def encoded_alike(refs: Sequence[ModelRef], folder: Path, params: GradientsParams) -> dict[str, list[Encoded]]:
    """The align examples of every task below a folder, which both models' tokenizers must read alike.

    Raises:
        UserError: there are none, they do not, or as `read_examples` and `encode`.
    """
    from pkt_stages.encoding import encode
    from pkt_stages.examples import align_files, read_examples
    from pkt_stages.models.load import load_tokenizer

    tokenizers = [load_tokenizer(ref) for ref in refs]
    found: dict[str, list[Encoded]] = {}
    for task, path in align_files(folder).items():
        found[task] = []
        for example in read_examples(path)[: params.num_examples]:
            how: Any = {"template": params.template, "max_length": params.max_length}
            first, second = (encode(tokenizer, example, **how) for tokenizer in tokenizers)
            if first != second:
                raise UserError(
                    f"{path}: example {example.id}: the two models' tokenizers or templates do not read it alike; a"
                    " gradient needs its partner at the same token; set another template, or take models of one"
                    " tokenizer"
                )
            found[task].append(first)
    return found


@with_params("gradients", GradientsParams)
def gradients(
    params: GradientsParams,
    source: Source,
    target: Target,
    examples: Annotated[Path, typer.Option(help="Folder of examples: <task>/align.jsonl.")],
    correlation: Annotated[Path, typer.Option(help="Folder of `pkt correlate`, for the pairs of layers.")],
    out: Annotated[Path, typer.Option(help="Folder for the sums.")],
    pairs_at_once: PairsAtOnce = PAIRS_AT_ONCE,
    device: Device = "cpu",
) -> None:
    """Sum up the answers' gradients at two models' projections, layer pair by layer pair: the ground of BiCo."""
    from pkt_stages.models.correlation import Correlation, write_pair
    from pkt_stages.models.folding import check_foldable
    from pkt_stages.models.gradients import LIST
    from pkt_stages.models.load import identity, load_config, load_model, load_tokenizer, resolve
    from pkt_stages.templates import dated

    watch = Stopwatch()
    artifacts.check_replaceable(out, LIST)
    refs = [resolve(source), resolve(target)]
    found, named = Correlation(correlation), [identity(ref) for ref in refs]
    found.check(*named)
    for ref in refs:
        check_foldable(load_config(ref))
    tasks = encoded_alike(refs, examples, params)
    every = [example for rows in tasks.values() for example in rows]
    batches = [every[start : start + params.batch_size] for start in range(0, len(every), params.batch_size)]
    meta: dict[str, Any] = {
        "source": named[0],
        "target": named[1],
        "params": asdict(params),
        "pairs": found.pairs,
        "examples": {task: len(rows) for task, rows in tasks.items()},
        "num_tokens": sum(len(example.ids) for example in every),
        "num_answer_tokens": sum(label >= 0 for example in every for label in example.labels[1:]),
        **dated(load_tokenizer(refs[1]), params.template),
    }
    models = [load_model(ref, dtype=params.dtype, device=device) for ref in refs]
    with artifacts.replaced_folder(out, LIST) as folder:
        for pair, sums in run(models, batches, found.pairs, pairs_at_once, grams=params.grams):
            write_pair(folder, pair, sums, params.stored, {**meta, "pair": pair}, artifacts.GRADIENTS)
        artifacts.write_json(folder / LIST, meta)
    what = f"{len(every)} examples of {len(tasks)} tasks, {meta['num_answer_tokens']:,} answer tokens"
    watch.summary("gradients", f"{what}, {len(found.pairs)} layer pairs", out)
