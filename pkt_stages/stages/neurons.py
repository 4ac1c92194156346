"""What do the best neurons stand for? Their tokens through the logit lens (paper appendix A.2, figure 5; METHODS 7).

An attribution + the model's tokenizer -> per example the highest-scored FFN and attention neurons: layer, neuron, score
in nats, and the vocabulary's tokens that the neuron's subvalue, times its coefficient, raises most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import Model, Stopwatch, option, with_params

SITE = {"ffn": "ffn_down", "attn": "attn_o"}


@dataclass(frozen=True)
class NeuronsParams:
    """Settings of the table."""

    num_examples: int = option(2, "Examples shown, the first that were attributed.", ge=1)
    num_neurons: int = option(
        5, "Neurons shown per example and sublayer; the attribution keeps its num_top best.", ge=1
    )


def run(attribution: artifacts.Artifact, tokenizer: Any, params: NeuronsParams) -> list[dict[str, Any]]:
    """The table's rows by example: `id`, `predicted` and `neurons`.

    Raises:
        UserError: more examples or neurons are asked for than the attribution holds.
    """
    norm, coefficient = (attribution.meta["params"][name][0] for name in ("norms", "coefficients"))
    scores = {"ffn": f"ffn_scores.{norm}", "attn": f"attn_scores.{norm}.{coefficient}"}
    count, top = attribution.shapes["top_neurons.ffn"][:2]
    for name, wanted, have in (("num_examples", params.num_examples, count), ("num_neurons", params.num_neurons, top)):
        if wanted > have:
            raise UserError(f"{attribution.path}: holds {have}, {name} asks for {wanted}")
    tensors = {
        sublayer: tuple(attribution[n] for n in (name, f"top_neurons.{sublayer}", f"top_tokens.{sublayer}"))
        for sublayer, name in scores.items()
    }
    found = []
    for example in range(params.num_examples):
        neurons = []
        for sublayer, (values, where, tokens) in tensors.items():
            for place, (layer, neuron) in enumerate(where[example, : params.num_neurons].tolist()):
                neurons.append(
                    {
                        "site": SITE[sublayer],
                        "layer": layer,
                        "neuron": neuron,
                        "score": float(values[example, layer, neuron]),
                        "tokens": [tokenizer.decode([token]) for token in tokens[example, place].tolist()],
                    }
                )
        about = {"id": attribution.meta["examples"][example]["id"], "predicted": attribution.meta["predicted"][example]}
        found.append({**about, "neurons": neurons})
    return found


@with_params("neurons", NeuronsParams)
def neurons(
    params: NeuronsParams,
    attribution: Annotated[Path, typer.Option(help="From `pkt attribute`.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the table (JSON).")],
) -> None:
    """List the highest-scored neurons of some examples with the tokens they stand for; the model is the attributed."""
    from pkt_stages.models.load import identity, is_same, load_tokenizer, resolve

    watch = Stopwatch()
    ref = resolve(model)
    found = artifacts.load(attribution, artifacts.ATTRIBUTION)
    if not is_same(found.meta["model"], identity(ref)):
        raise UserError(f"{attribution}: made from {found.meta['model']['name']}, {model} is another model")
    table = run(found, load_tokenizer(ref), params)
    about = {"model": found.meta["model"], "params": asdict(params), "attribution": found.meta["params"]}
    artifacts.write_json(out, about | {"examples": table})
    for example in table:
        typer.echo(f"{example['id']}, predicting {example['predicted']!r}:")
        for row in example["neurons"]:
            where = f"  {row['site']:8} layer {row['layer']:2} neuron {row['neuron']:5} {row['score']:+.3f} nats"
            typer.echo(where + "  " + " ".join(repr(token) for token in row["tokens"]))
    watch.summary("neurons", f"{params.num_neurons} per sublayer on {len(table)} examples", out)
