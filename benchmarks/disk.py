"""Commands that move weights: time and memory of `select`, `inject`, `export` and `reexpress` beside a plain copy.

    python -m benchmarks.disk --folder FOLDER [--layers 4] [--shard 500MB]

Makes a random bfloat16 checkpoint in the width of Llama-2 7B, in shards, with the vocabulary of the embedded tokenizer
and few layers, and, with as few steps as there can be, what the commands take (attribution, mapping). The plain copy of
a command reads the checkpoint once in pieces and writes as many bytes as the command wrote, in a process of its own.
The files of both are synced (fsync) within their time; both run in turn, and the shortest time of each counts. Each
command runs on a model of the same kind that is 64 wide, too: that time is the start of a process, imports above all,
and is subtracted. Memory is the peak of the command's process (`ru_maxrss`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.cka import FULL, random_model

LOSSY = "--allow-rounding-loss"  # of a mapping that was trained for one step
TOKENIZER, VOCABULARY = Path("data/tiny/target-chat"), 1024
COPY = """
import os, sys
from pathlib import Path
left = int(sys.argv[1])
with open(sys.argv[2], "wb") as out:
    for path in map(Path, sys.argv[3:]):
        with path.open("rb") as file:
            while piece := file.read(2**24):
                out.write(piece[:left])
                left -= min(left, len(piece))
    while left:
        left -= out.write(bytes(min(left, 2**24)))
    out.flush()
    os.fsync(out.fileno())
"""


@dataclass(frozen=True)
class Run:
    """Seconds until all is on disk, seconds of the processor, and the peak of the process, bytes."""

    seconds: float
    processor: float
    peak: int


def measured(command: list[str], written: Path | None = None) -> Run:
    """Run it in a process of its own; what it wrote below `written` is synced within the time."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:5])} ...: exit status {process.returncode}")
    for path in files(written) if written is not None else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return Run(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def make_model(folder: Path, sizes: tuple[int, int, int, int], shard: str) -> None:
    """A random bfloat16 Llama of these sizes, with the embedded tokenizer."""
    model = random_model(sizes, "cpu", torch.bfloat16, VOCABULARY)
    model.save_pretrained(folder, max_shard_size=shard)
    for path in (*TOKENIZER.glob("*token*"), *TOKENIZER.glob("*.jinja")):
        shutil.copy(path, folder)


def prepare(folder: Path, examples: Path) -> None:
    """Attribution, selection and mapping for a model as its own source; one example of each kind is enough."""
    for name in ("extract", "transfer", "align"):
        lines = (examples / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[: 4 if name == "align" else 1]) + "\n", encoding="utf-8")
    model, extract = folder / "model", folder / "extract.jsonl"
    pkt(
        ["attribute", "--model", model, "--extract", extract, "--transfer", folder / "transfer.jsonl"],
        folder / "scores.safetensors",
    )
    pkt(commands(folder)["select"], folder / "select")
    align = ["align", "--target", model, "--selection", folder / "select", "--extract", extract]
    align += ["--align", folder / "align.jsonl", "--metrics", folder / "align.json", "--steps", "1"]
    pkt([*align, "--batch-size", "2", "--validation-size", "1", "--set", "init_std=0.01"], folder / "mapping")


def command(words: list[str | Path], out: Path) -> list[str]:
    return [sys.executable, "-m", "pkt_stages", *map(str, words), "--out", str(out)]


def pkt(words: list[str | Path], out: Path) -> None:
    subprocess.run(command(words, out), check=True, stdout=subprocess.DEVNULL)


def commands(folder: Path) -> dict[str, list[str | Path]]:
    """What is measured: a command's words, by the folder that it writes."""
    model = folder / "model"
    d_model, d_ff, heads = (
        json.loads((model / "config.json").read_text())[name]
        for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    wider = FULL[0][0] * d_model // FULL[1][0], FULL[0][1] * d_ff // FULL[1][1], FULL[0][3] * heads // FULL[1][3]
    shape = zip(("--d-model", "--d-ff", "--num-heads", "--num-kv-heads"), (*wider, wider[2]), strict=True)
    return {
        "select": [
            "select",
            "--source",
            model,
            "--source-scores",
            folder / "scores.safetensors",
            "--target-scores",
            folder / "scores.safetensors",
        ],
        "inject": [
            "inject",
            "--target",
            model,
            "--selection",
            folder / "select",
            "--mapping",
            folder / "mapping",
            LOSSY,
        ],
        "export": ["export", "--model", model, "--delta", folder / "inject", LOSSY],
        "reexpress": ["reexpress", "--model", model, *(str(word) for pair in shape for word in pair)],
    }


def main(
    folder: Annotated[Path, typer.Option(help="Where to write; removed at the end.")],
    layers: int = 4,
    repeats: Annotated[int, typer.Option(help="Of each command and its copy in turn; the shortest counts.")] = 2,
    shard: str = "500MB",
    examples: Annotated[Path, typer.Option(help="A folder of `pkt prepare`.")] = Path("artifacts/tiny/examples/gsm8k"),
) -> None:
    small, large = folder / "small", folder / "large"
    try:
        for at, sizes in ((small, (64, 172, layers, 2)), (large, (*FULL[1][:2], layers, FULL[1][3]))):
            # Elsewhere: to the peak of a process the kernel counts that of the one which started it.
            making = multiprocessing.get_context("spawn").Process(target=make_model, args=(at / "model", sizes, shard))
            making.start()
            making.join()
            if making.exitcode:
                raise SystemExit(f"{at}: no model was made")
            prepare(at, examples)
        weights = sorted((large / "model").glob("*.safetensors"))
        print(f"{size(weights) / 1e9:.2f} GB of bfloat16 in {len(weights)} files, {layers} layers")
        print("by clock and, in brackets, by processor; seconds without those of the start, which stand beside")
        print("command        start, s    command, s       copy, s  ratio  written, GB  peak, GiB (of the small model)")
        for name, words in commands(large).items():
            start = measured(command(commands(small)[name], small / name), small / name)
            taken, copied = [], []
            for _ in range(repeats):
                shutil.rmtree(large / name, ignore_errors=True)
                taken.append(measured(command(words, large / name), large / name))
                written = size(files(large / name))
                copied.append(
                    measured([sys.executable, "-c", COPY, str(written), str(large / "copy"), *map(str, weights)])
                )
                (large / "copy").unlink()
            own, plain = (min(runs, key=lambda run: run.seconds) for runs in (taken, copied))
            peaks = [max(run.peak for run in runs) / 2**30 for runs in (taken, [start])]
            seconds, processor = own.seconds - start.seconds, own.processor - start.processor
            print(
                f"{name:10} {start.seconds:6.1f} ({start.processor:4.1f}) {seconds:6.1f} ({processor:4.1f})"
                f" {plain.seconds:6.1f} ({plain.processor:4.1f}) {seconds / plain.seconds:6.1f} {written / 1e9:12.2f}"
                f" {peaks[0]:10.2f} ({peaks[1]:.2f})",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
