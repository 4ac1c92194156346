"""Attribution against its parts, and against a plain baseline in the style of the published code, in one run.

Its parts are what no exact method can leave out: the forward passes, batched, and the product of every neuron's
subvalue with the unembedding. All times are of the processor, so that what else runs beside them counts less.
The baseline does, per example and layer, one [neurons, d] x [d, vocab] product, a softmax and a log. It is timed on
`--baseline-examples` of the examples and scaled to all (it does the same work for each); ours runs on all of them.

    python benchmarks/attribution.py                                  # random weights, 12 layers, d 512, vocab 8192
    python benchmarks/attribution.py --model DIR --examples F.jsonl   # a real model and real text
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pkt_stages.core.attribution import TILES
from pkt_stages.encoding import Located, locate
from pkt_stages.examples import read_examples
from pkt_stages.models.capture import batches, capture, capture_all, lens, subvalues
from pkt_stages.models.load import load_model, load_tokenizer, resolve
from pkt_stages.models.sites import as_rows, geometry, weight_name
from pkt_stages.stages.attribute import AttributeParams, run


def random_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def baseline(model: torch.nn.Module, located: list[Located]) -> list[dict[str, torch.Tensor]]:
    """Scores [layer, neuron] per example and sublayer, float32, straight from the definition."""
    sizes = geometry(model.config)
    own = lens(model)
    unembedding, eps = own.unembedding, own.eps
    found = []
    for item in located:
        kept = capture(model, item.context)
        rms = (kept.final.square().mean() + eps).sqrt()
        scores: dict[str, list[torch.Tensor]] = {"ffn": [], "attn": []}
        for layer in range(sizes.num_layers):
            for sublayer, site, base, c in (
                ("attn", "attn_o", kept.layer_input[layer], kept.attn_coefficients[layer]),
                ("ffn", "ffn_down", kept.layer_input[layer] + kept.attn_output[layer], kept.ffn_coefficients[layer]),
            ):
                subvalues = as_rows(model.get_parameter(weight_name(layer, site)), site)
                before = torch.log(torch.softmax(unembedding @ base / rms, -1))[item.predicted]
                moved = torch.softmax((base + c[:, None] * subvalues) @ unembedding.mT / rms, -1)
                scores[sublayer].append(torch.log(moved)[:, item.predicted] - before)
        found.append({sublayer: torch.stack(s) for sublayer, s in scores.items()})
    return found


def forward(model: torch.nn.Module, located: list[Located]) -> None:
    """The forward passes alone, in the batches of the attribution."""
    for batch in batches([item.context for item in located]):
        capture_all(model, [located[i].context for i in batch])


@torch.no_grad()
def directions(model: torch.nn.Module) -> None:
    """The direction products alone, [neuron, d] x [d, vocab], in the tiles of the attribution."""
    rows, columns = TILES["cpu"]
    unembedding = lens(model).unembedding
    held = torch.empty(rows, columns)
    for layer in range(geometry(model.config).num_layers):
        for sublayer in ("attn", "ffn"):
            for v in subvalues(model, layer, sublayer).contiguous().split(rows):
                for u in unembedding.split(columns):
                    torch.mm(v, u.mT, out=held[: len(v), : len(u)])


def timed(work: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """What it gives, and the seconds of processor time that it took."""
    start = time.process_time()
    made = work(*given)
    return made, time.process_time() - start


def matmul_rate(seconds: float = 2.0) -> float:
    """Floating-point operations a second (of processor time) of a large float32 product, at the current threads."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        a @ b
        count += 1
    return count * 2 * 2048**3 / (time.process_time() - start)


def main(
    model: Annotated[str | None, typer.Option(help="Model folder; random weights without.")] = None,
    examples: Annotated[Path | None, typer.Option(help="Examples of that model.")] = None,
    num_examples: int = 32,
    baseline_examples: Annotated[int, typer.Option(help="0: without the baseline, which is slow.")] = 2,
    repeats: Annotated[int, typer.Option(help="Times are the least of so many.")] = 1,
) -> None:
    torch.set_num_threads(1)
    if model is None:
        loaded = random_model()
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, loaded.config.vocab_size, (num_examples, 65), generator=draw).tolist()
        located = [Located(row[:-1], row[-1]) for row in ids]
    else:
        assert examples is not None, "--model needs --examples"
        ref = resolve(model)
        loaded, tokenizer = load_model(ref, dtype="float32"), load_tokenizer(ref)
        texts = read_examples(examples)
        located = [locate(tokenizer, e, template="chat", max_length=10**6) for e in texts]
        located = (located * (num_examples // len(located) + 1))[:num_examples]

    sizes = geometry(loaded.config)
    rate = matmul_rate()
    plain, plain_time = timed(baseline, loaded, located[:baseline_examples])
    params = AttributeParams(norms=("rms",), coefficients=("all_positions",))
    passes, products, all_of_it = [], [], []
    for _ in range(repeats):
        passes.append(timed(forward, loaded, located)[1])
        products.append(timed(directions, loaded)[1])
        (tensors, share), ours = timed(run, loaded, located, params)
        all_of_it.append(ours)
    ours, parts = min(all_of_it), (min(passes), min(products))

    neurons = sizes.num_layers * (sizes.d_ff + sizes.num_attn_neurons)
    operations = 2 * neurons * sizes.vocab_size * (sizes.d_model + 3 * num_examples)
    print(f"neurons {neurons:,}, vocab {sizes.vocab_size:,}, examples {num_examples}; seconds of one core")
    print(f"forward passes {parts[0]:.2f} + direction products {parts[1]:.2f}; all of it {ours:.2f}", end="")
    print(f", {ours / sum(parts):.2f}x its parts")
    if plain:
        difference = max(
            float((tensors[name][e] - plain[e][sublayer]).abs().max())
            for e in range(baseline_examples)
            for sublayer, name in (("ffn", "ffn_scores.rms"), ("attn", "attn_scores.rms.all_positions"))
        )
        each = plain_time / baseline_examples
        print(f"baseline {each:.2f} per example = {each * num_examples:.1f}: ratio", end="")
        print(f" {each * num_examples / ours:.1f}x; largest difference {difference:.1e} nats")
    print(f"plain path: ffn {share['ffn']:.2%}, attn {share['attn']:.2%} of pairs")
    reached = operations / ours / rate
    print(f"matrix products reach {reached:.0%} of the {rate / 1e9:.0f} GFLOP/s measured here")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (both included)")


if __name__ == "__main__":
    typer.run(main)
