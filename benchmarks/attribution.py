"""Attribution against a plain baseline in the style of the published code, in one run at equal threads.

The baseline does, per example and layer, one [neurons, d] x [d, vocab] product, a softmax and a log. It is timed on
`--baseline-examples` of the examples and scaled to all (it does the same work for each); ours runs on all of them.

    python benchmarks/attribution.py                                  # random weights, 12 layers, d 512, vocab 8192
    python benchmarks/attribution.py --model DIR --examples F.jsonl   # a real model and real text
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from pkt_stages.encoding import Located, locate
from pkt_stages.examples import read_examples
from pkt_stages.models.capture import capture, lens
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


def matmul_rate(seconds: float = 2.0) -> float:
    """Floating-point operations a second of a large float32 product, at the current number of threads."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * 2048**3 / (time.perf_counter() - start)


def main(
    model: Annotated[str | None, typer.Option(help="Model folder; random weights without.")] = None,
    examples: Annotated[Path | None, typer.Option(help="Examples of that model.")] = None,
    num_examples: int = 32,
    baseline_examples: int = 2,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
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
    start = time.perf_counter()
    plain = baseline(loaded, located[:baseline_examples])
    plain_each = (time.perf_counter() - start) / baseline_examples
    start = time.perf_counter()
    tensors, share = run(loaded, located, AttributeParams(norms=("rms",), coefficients=("all_positions",)))
    ours = time.perf_counter() - start

    difference = max(
        float((tensors[name][e] - plain[e][sublayer]).abs().max())
        for e in range(baseline_examples)
        for sublayer, name in (("ffn", "ffn_scores.rms"), ("attn", "attn_scores.rms.all_positions"))
    )
    neurons = sizes.num_layers * (sizes.d_ff + sizes.num_attn_neurons)
    directions = 2 * neurons * sizes.d_model * sizes.vocab_size
    moments = 2 * neurons * 4 * num_examples * sizes.vocab_size
    print(f"neurons {neurons:,}, vocab {sizes.vocab_size:,}, examples {num_examples}, threads {threads}")
    print(f"baseline {plain_each:.2f} s per example = {plain_each * num_examples:.1f} s; ours {ours:.1f} s in all")
    print(f"ratio {plain_each * num_examples / ours:.1f}x; largest difference {difference:.1e} nats")
    print(f"plain path: ffn {share['ffn']:.2%}, attn {share['attn']:.2%} of pairs")
    reached = (directions + moments) / ours / rate
    print(f"matrix products reach {reached:.0%} of the {rate / 1e9:.0f} GFLOP/s measured here")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (both included)")


if __name__ == "__main__":
    typer.run(main)
