"""`make cluster`, second part: a team's cache on an SSH server and on S3 (moto's server), both on loopback.

Two members; one task alone; a connection that breaks in the middle, both ways; and a remote that may only be read.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from pkt_stages.artifacts import content_hash
from tests.cluster.daemons import USER, Cut, s3_server, ssh_server
from tests.pipeline.repository import LATEN, dvc, environment, make_repository, ran, run, shrink
from tests.profiles import rows

READ_ONLY = """{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}]}"""
ALL = READ_ONLY.replace('["s3:Get*", "s3:List*"]', '"s3:*"')


@dataclass(frozen=True)
class Remote:
    """The same files through two doors: one whose connection can be cut, and one through which nothing is written."""

    url: str
    cut: Cut
    options: dict[str, str]
    read_only: dict[str, str]

    def join(self, folder: Path, *, read_only: bool = False) -> None:
        """Make it the default of a clone, with settings that stay in this clone."""
        dvc(folder, "remote", "add", "-q", "-f", "-d", "--local", "team", self.url)
        # Without it a pull that breaks leaves the first part of an object in the cache, under the name of the whole.
        options = {"verify": "true"} | (self.read_only if read_only else self.options)
        for name, value in options.items():
            dvc(folder, "remote", "modify", "-q", "--local", "team", name, value)


@pytest.fixture(scope="module", params=["ssh", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "ssh":
        with ssh_server(folder / "ssh") as port, ssh_server(folder / "ssh", read_only=True) as other:
            (folder / "cache").mkdir()
            cut = Cut(port)
            options = {"keyfile": str(folder / "ssh/key"), "allow_agent": "false", "user": USER}
            url = f"ssh://127.0.0.1{folder}/cache"
            yield Remote(url, cut, options | {"port": str(cut.port)}, options | {"port": str(other)})
    else:
        with s3_server(folder / "s3", free_requests=7) as port:
            cut = Cut(port)
            address = f"http://127.0.0.1:{port}"
            writer, reader = members(address)
            yield Remote(
                "s3://pkt/cache",
                cut,
                writer | {"endpointurl": f"http://127.0.0.1:{cut.port}"},
                reader | {"endpointurl": address},
            )


def members(address: str) -> tuple[dict[str, str], dict[str, str]]:
    """A bucket, and the keys of one who may write and of one who may not; then the server asks for them."""
    anyone: dict[str, Any] = {"endpoint_url": address, "region_name": "us-east-1"}
    anyone |= {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing"}
    boto3.client("s3", **anyone).create_bucket(Bucket="pkt")
    users = boto3.client("iam", **anyone)
    found = []
    for name, policy in (("writer", ALL), ("reader", READ_ONLY)):
        users.create_user(UserName=name)
        users.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=policy)
        key = users.create_access_key(UserName=name)["AccessKey"]
        found.append({"access_key_id": key["AccessKeyId"], "secret_access_key": key["SecretAccessKey"]})
    return found[0], found[1]


def some_stages(params: dict[str, Any]) -> None:
    shrink(params)
    rows(params, align=LATEN)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A member's repository in which attribution and selection have run; nothing is pushed."""
    folder = make_repository(tmp_path_factory.mktemp("made") / "repository", some_stages)
    dvc(folder, "repro", "-q", "select@source-gsm8k")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "attribution and selection")
    return folder


def cached(folder: Path) -> dict[str, str]:
    """What a clone's cache holds, by name and content; a half-written object would have a content of its own."""
    objects = folder / ".dvc/cache/files/md5"
    return {str(path.relative_to(objects)): content_hash(path) for path in objects.rglob("*") if path.is_file()}


def fails(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, env=environment(folder)
    )
    assert done.returncode != 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    print(f"dvc {' '.join(arguments)}: {said}")
    return said


def clone(of: Path, folder: Path, remote: Remote, *, read_only: bool = False) -> Path:
    """A colleague's clone, without the source model."""
    run(of, "git", "clone", "-q", str(of), str(folder))
    run(folder, "git", "config", "user.email", "another@example.com")
    run(folder, "git", "config", "user.name", "another")
    shutil.rmtree(folder / "data/tiny/source-chat")
    remote.join(folder, read_only=read_only)
    return folder


def test_a_team(made: Path, remote: Remote, tmp_path: Path) -> None:
    first = Path(shutil.copytree(made, tmp_path / "first"))
    remote.join(first)
    # The connection breaks in the middle of a push, then in the middle of a pull; the next one goes on.
    size = sum(path.stat().st_size for path in (first / ".dvc/cache").rglob("*") if path.is_file())
    remote.cut.after(size // 2)
    fails(first, "push", "dvc.yaml")
    remote.cut.after(None)
    dvc(first, "push", "-q", "dvc.yaml")
    second = clone(first, tmp_path / "second", remote)
    remote.cut.after(size // 4)
    fails(second, "pull", "code", "prepare", "select")
    assert cached(second).items() <= cached(first).items()
    remote.cut.after(None)
    # Of the first member's work only what LaTen's row reads; the source model is not needed.
    stages = ran(dvc(second, "repro", "--pull", "--allow-missing", "evaluate@laten-source-gsm8k"))
    assert {name.split("@")[0] for name in stages} == {"align", "inject", "evaluate"}
    assert not (second / "artifacts/tiny/attribute").exists()
    # And back again.
    dvc(second, "push", "-q", "align", "inject", "evaluate")
    run(second, "git", "add", "dvc.lock", "results")
    run(second, "git", "commit", "-q", "-m", "LaTen")
    run(first, "git", "pull", "-q", str(second), "main")
    assert ran(dvc(first, "repro", "--pull", "--allow-missing", "evaluate@laten-source-gsm8k")) == set()
    dvc(first, "pull", "-q", "inject")
    transfer = "artifacts/tiny/transfer/laten/source/gsm8k"
    mine, theirs = ({p.name: content_hash(p) for p in (f / transfer).iterdir()} for f in (first, second))
    assert mine == theirs
    # A guest reads all and writes nothing.
    guest = clone(first, tmp_path / "guest", remote, read_only=True)
    dvc(guest, "pull", "-q", "select")
    dvc(guest, "repro", "-q", "--pull", "--allow-missing", "texts")
    before = cached(guest)
    said = fails(guest, "push", "texts")
    assert "denied" in said.lower() or "forbidden" in said.lower() or "permission" in said.lower()
    assert cached(guest) == before
    dvc(first, "push", "-q", "dvc.yaml")
