"""DVC's command line with a quick way to update dvc.lock: `python -m pkt_stages.quick_dvc repro -s STAGE`.

At the end of a stage DVC parses and writes the whole of dvc.lock by ruamel.yaml in pure Python, which takes 4 s for 250
kB, more than most stages of a small profile. Here only the entries that changed are written by DVC's own writer, and
take the place of the old ones in the text; the bytes are those of DVC.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = "schema: '2.0'\nstages:\n"
# A mapping or list that stands in an entry twice; a scalar cannot look like it.
_ANCHOR = re.compile(r"(?<=[:-] )(?P<kind>[&*])id(?P<number>\d{3,})(?=$| \{\}$| \[\]$)", re.MULTILINE)
_ENTRY = re.compile(r"^  (?=\S)", re.MULTILINE)  # where a stage's lines begin


@contextlib.contextmanager
def modify_lock(path: str, fs: Any = None) -> Iterator[dict[str, Any]]:
    """Within the context the content of a YAML file, which is written afterwards; in place of DVC's `modify_yaml`."""
    from dvc.utils.serialize import _yaml

    text = (
        Path(path).read_text(encoding="utf-8") if os.path.basename(path) == "dvc.lock" and os.path.exists(path) else ""
    )
    data = _yaml.parse_yaml(text, path)
    entries = _entries(text, data)
    if entries is None:
        with _yaml.modify_yaml(path, fs=fs) as whole:
            yield whole
        return
    before = copy.deepcopy(data["stages"])
    yield data
    for name, entry in data["stages"].items():
        if before.get(name) != entry:
            stream = io.StringIO()
            _yaml._dump({"schema": "2.0", "stages": {name: entry}}, stream)
            entries[name] = stream.getvalue().removeprefix(HEAD)
    new = Path(f"{path}.new")
    new.write_text(HEAD + "".join(_numbered([entries[name] for name in data["stages"]])), encoding="utf-8")
    new.replace(path)


def _numbered(entries: Sequence[str]) -> Iterator[str]:
    """The entries with their anchors, which name what an entry holds twice, numbered through the whole file."""
    before = 0
    for entry in entries:
        found = sorted({int(match["number"]) for match in _ANCHOR.finditer(entry)})
        numbers = {number: f"id{before + n:03}" for n, number in enumerate(found, 1)}
        pieces, end = [], 0
        for match in _ANCHOR.finditer(entry):
            pieces += [entry[end : match.start()], match["kind"], numbers[int(match["number"])]]
            end = match.end()
        yield "".join([*pieces, entry[end:]])
        before += len(found)


def _entries(text: str, data: Mapping[str, Any]) -> dict[str, str] | None:
    """The text of each stage's entry; None unless the text is laid out as DVC lays it out."""
    if not text.startswith(HEAD) or set(data) != {"schema", "stages"}:
        return None
    body = text.removeprefix(HEAD)
    starts = [match.start() for match in _ENTRY.finditer(body)]
    parts = [body[start:end] for start, end in zip(starts, [*starts[1:], len(body)], strict=True)]
    names = list(data["stages"] or {})
    fits = len(parts) == len(names) and "".join(parts) == body
    if not fits or any(not part.startswith(f"  {name}:\n") for part, name in zip(parts, names, strict=True)):
        return None
    return dict(zip(names, parts, strict=True))


def main() -> int:
    """DVC with the arguments of this process; its exit status."""
    from dvc import dvcfile
    from dvc.cli import main as dvc

    dvcfile.modify_yaml = modify_lock
    return int(dvc(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
