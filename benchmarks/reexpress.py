"""A random model in the width of Llama-2 7B, written again in that of 13B: time, memory, and equal logits.

    python -m benchmarks.reexpress --layers 8 --folder FOLDER --device cuda
    python -m benchmarks.reexpress --small --folder FOLDER            # a rehearsal

Beside it a plain copy of as many bytes as the new model has. Memory is that of the command's own process.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.cka import FULL, random_model

TOKENIZER = Path("data/tiny/target-base")


def logits(folder: Path, ids: torch.Tensor, device: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device)
    with torch.no_grad():
        return model(ids.to(device)).logits.double().cpu()


def main(
    folder: Annotated[Path, typer.Option(help="Where to write both models.")],
    layers: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    small: bool = False,
) -> None:
    source, target = ((160, 400, 40, 5), (128, 352, 32, 4)) if small else FULL
    target = (target[0], target[1], layers, target[3])
    new_layers = layers * FULL[0][2] // FULL[1][2]
    model = random_model(target, device, torch.float16, 32000)
    torch.manual_seed(1)
    with torch.no_grad():  # as large as a trained model's, so that a wrong logit shows
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else weight * 2)
    old, new = folder / "old", folder / "new"
    model.save_pretrained(old)
    for path in TOKENIZER.glob("*token*"):
        shutil.copy(path, old)
    parameters = sum(p.numel() for p in model.parameters())
    del model

    names = ("--d-model", "--d-ff", "--num-layers", "--num-heads", "--num-kv-heads")
    sizes = (source[0], source[1], new_layers, source[3], source[3])
    shape = [str(word) for pair in zip(names, sizes, strict=True) for word in pair]
    start = time.perf_counter()
    command = [sys.executable, "-m", "pkt_stages", "reexpress", "--model", old, "--out", new, "--dtype", dtype, *shape]
    subprocess.run(command, check=True)
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    size = sum(path.stat().st_size for path in new.glob("*.safetensors")) / 1e9
    start = time.perf_counter()
    for path in new.glob("*.safetensors"):
        shutil.copyfile(path, folder / "copy")
    copied = time.perf_counter() - start
    (folder / "copy").unlink()

    ids = torch.randint(3, 32000, (2, 64), generator=torch.Generator().manual_seed(2))
    before, after = (logits(one, ids, device) for one in (old, new))
    error = float((before - after).abs().max())
    print(f"{parameters / 1e9:.2f}e9 weights in {layers} layers -> {size:.1f} GB of {dtype} in {new_layers} layers")
    print(f"{taken:.1f} s, {size / taken:.2f} GB/s written; peak memory {peak:.1f} GiB")
    print(f"a plain copy of the new model {copied:.1f} s: ratio {taken / copied:.1f}")
    print(f"logits within {float(before.min()):.1f} .. {float(before.max()):.1f}, largest difference {error:.1e}")


if __name__ == "__main__":
    typer.run(main)
