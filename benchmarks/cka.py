"""CKA of two models: how much of the time is not their forward passes, and the ratio to a plain pairwise loop.

The plain loop takes features that were captured once and, for every pair of layers at every site, builds both Gram
matrices and the three HSIC terms anew, as published code does; it is timed on some pairs and scaled to all, and printed
as such. (With a forward pass per pair it would be slower still, by the number of pairs.)

    python -m benchmarks.cka                      # two random models of 24 and 20 layers, d 384 and 256, on a CPU
    python -m benchmarks.cka --full --device cuda # sizes of Llama-2 13B and 7B, random weights in float16
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
import typer
from torch import Tensor

from pkt_stages.core.similarity import CkaSums, centred_gram, minibatches
from pkt_stages.models.batches import Batch
from pkt_stages.models.features import features
from pkt_stages.models.sites import SITES

# d_model, d_ff, layers, heads
SMALL = ((384, 1024, 24, 6), (256, 704, 20, 4))
FULL = ((5120, 13824, 40, 40), (4096, 11008, 32, 32))


def random_model(sizes: tuple[int, int, int, int], device: str, dtype: torch.dtype, vocab: int = 8192) -> Any:
    """A Llama of these sizes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=1024, **dict(zip(names, sizes, strict=True)))
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def plain_cka(x: Tensor, y: Tensor) -> float:
    """One pair of layers: both Gram matrices and unbiased HSIC three times, term by term, float64."""

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = len(k)
        ones = torch.ones(n, dtype=k.dtype, device=k.device)
        k, m = k - k.diag().diag(), m - m.diag().diag()
        cross = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return ((k @ m).trace() + cross - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    k, m = x.double() @ x.double().mT, y.double() @ y.double().mT
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(models: Sequence[Any], *, texts: int, tokens: int, micro_batch: int, pairs: int) -> dict[str, float]:
    """Seconds of the parts and of the plain loop (from some pairs), the number of pairs, the worst difference."""
    device = str(models[0].device)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(models[0].config.vocab_size, (texts, tokens), generator=draw).tolist()
    # The first passes allocate; they are not measured.
    for model in models:
        features(model, Batch(ids[:micro_batch]), tokens="mean", micro_batch_size=micro_batch)

    start = clock(device)
    with torch.no_grad():
        for model in models:
            for at in range(0, texts, micro_batch):
                batch = torch.tensor(ids[at : at + micro_batch], device=device)
                model.model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    forward = clock(device) - start

    start = clock(device)
    found = [features(model, Batch(ids), tokens="mean", micro_batch_size=micro_batch) for model in models]
    captured = clock(device) - start
    start, maps = clock(device), {}
    for site in SITES:
        sums = CkaSums()
        for batch in minibatches(texts, texts):
            grams = [torch.stack([centred_gram(f[list(batch)]) for f in side[site]]) for side in found]
            sums.add(*grams)
        maps[site] = sums.cka()
    compared = clock(device) - start

    every = [(s, i, j) for s in SITES for i in range(len(found[0][s])) for j in range(len(found[1][s]))]
    sample = every[:: max(1, len(every) // pairs)][:pairs]
    start = clock(device)
    plain = [plain_cka(found[0][s][i], found[1][s][j]) for s, i, j in sample]
    seconds = (clock(device) - start) / len(sample) * len(every)
    worst = max(abs(value - float(maps[s][i, j])) for value, (s, i, j) in zip(plain, sample, strict=True))
    return {
        "pairs": len(every),
        "forward": forward,
        "with_hooks": captured,
        "comparison": compared,
        "plain_loop": seconds,
        "worst": worst,
    }


def main(
    texts: int = 200, tokens: int = 96, micro_batch: int = 8, pairs: int = 200, full: bool = False, device: str = "cpu"
) -> None:
    torch.set_num_threads(1)
    sizes, dtype = (FULL, torch.float16) if full else (SMALL, torch.float32)
    models = [random_model(one, device, dtype) for one in sizes]
    found = measure(models, texts=texts, tokens=tokens, micro_batch=micro_batch, pairs=pairs)
    outside = found["comparison"] / (found["with_hooks"] + found["comparison"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"torch {torch.__version__}, {device}, {texts} texts of {tokens} tokens, {found['pairs']} pairs of layers")
    print(f"forward passes: bare {found['forward']:.2f} s, with hooks that reduce {found['with_hooks']:.2f} s")
    print(f"comparison {found['comparison']:.2f} s; outside the forward passes: {outside:.1%} of all")
    ratio = found["plain_loop"] / found["comparison"]
    print(f"plain loop over pairs {found['plain_loop']:.2f} s (from {pairs}): {ratio:.0f} times the comparison")
    print(f"largest difference {found['worst']:.1e}; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
