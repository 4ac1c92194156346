"""Whatever stands in a file: it is read, or refused in one line. No traceback, no hang, nothing huge allocated."""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pkt_stages import artifacts, tasks
from pkt_stages.errors import UserError
from pkt_stages.evaluation import scoring
from pkt_stages.evaluation.scoring import last_number
from pkt_stages.examples import read_examples, read_jsonl
from pkt_stages.params import build, read_settings
from pkt_stages.tools import inspect
from tests.tasks.test_gsm8k import score
from tests.test_params import Example

# One file is written over and over again, so a test's folder may serve all of its examples.
many = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def refused(read: Callable[[], object]) -> bool:
    """Whether it ends in a UserError, of one line; any other exception is the test's failure."""
    with contextlib.suppress(UserError):
        read()
        return False
    return True


def described(path: Path) -> None:
    """Everything that `pkt inspect` looks at, each tensor included."""
    json.dumps(inspect.run(path))


def valid(folder: Path) -> bytes:
    path = folder / "valid.safetensors"
    tensors = {"cka.ffn_up": torch.tensor([[0.25, 0.5]], dtype=torch.float64), "cka.attn_v": torch.zeros(1, 2).double()}
    artifacts.save(path, artifacts.CKA, tensors, {"params": {"num_texts": 8}})
    return path.read_bytes()


# --- artifacts ----------------------------------------------------------------------------------------------------


@many
@given(st.binary(max_size=200))
def test_bytes_are_no_artifact(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert refused(lambda: artifacts.load(path, artifacts.CKA))
    assert refused(lambda: described(path))


@many
@given(
    st.lists(st.tuples(st.integers(0, 600), st.binary(max_size=4)), max_size=4),
    st.integers(0, 600),
)
def test_a_changed_artifact(tmp_path: Path, changes: list[tuple[int, bytes]], length: int) -> None:
    """Bytes are overwritten, and it is cut at some length."""
    content = bytearray(valid(tmp_path))
    for place, new in changes:
        content[place : place + len(new)] = new
    path = tmp_path / "a.safetensors"
    path.write_bytes(content[:length])
    refused(lambda: artifacts.load(path, artifacts.CKA).tensors())
    refused(lambda: described(path))


def artifact_of(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@many
@given(
    JSON, st.lists(st.integers(0, 2**64), max_size=3), st.sampled_from(["F64", "F32", "I64", "BOOL", "F8_E4M3", "X"])
)
@example({"kind": ["cka"]}, [1, 2], "F64")
@example({"kind": "cka", "schema_version": 1}, [10**9, 10**9], "F64")
@example({"kind": "cka", "schema_version": 1}, [0, 10**18], "F64")
@example({"kind": "cka", "schema_version": 1}, [2**32, 2**32], "F64")
def test_an_artifact_with_another_header(tmp_path: Path, meta: Any, shape: list[int], dtype: str) -> None:
    path = tmp_path / "a.safetensors"
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, 16]}
    path.write_bytes(artifact_of({"__metadata__": {"pkt": json.dumps(meta)}, "cka.ffn_up": tensor}, bytes(16)))
    whole = meta == {"kind": "cka", "schema_version": 1} and shape in ([1, 2], [2, 1]) and dtype == "F64"
    assert refused(lambda: artifacts.load(path, artifacts.CKA).tensors()) is not whole
    refused(lambda: described(path))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"kind": ' + "9" * 5000 + "}", '"\\ud800"', "NaN", '{"kind": "\\ud800"}']
)
def test_metadata_that_python_cannot_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(artifact_of({"__metadata__": {"pkt": text}}, b""))
    assert refused(lambda: artifacts.load(path, artifacts.CKA))
    assert refused(lambda: described(path))


@pytest.mark.parametrize("name", ["../cka.ffn_up", "cka./etc/passwd", "cka.a\nb", "cka.", "cka.{site}", "cka.a.b"])
def test_names_of_tensors_are_words(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    tensor = {"dtype": "F64", "shape": [1, 2], "data_offsets": [0, 16]}
    meta = json.dumps({"kind": "cka", "schema_version": 1})
    path.write_bytes(artifact_of({"__metadata__": {"pkt": meta}, name: tensor}, bytes(16)))
    with pytest.raises(UserError) as caught:
        artifacts.load(path, artifacts.CKA)
    assert "unexpected tensor" in str(caught.value) and "\n" not in str(caught.value)


# --- params -------------------------------------------------------------------------------------------------------


def settings_of(path: Path) -> None:
    """What a command does with its params file."""
    for how in ({}, {"task": "t"}, {"method": "m"}):
        build(Example, read_settings(path, "s", **how), "here")


FIELDS = st.sampled_from(["rate", "steps", "rule", "names", "limit", "flag", "s", "other"])


@many
@given(st.text(max_size=60) | st.text("{}[]:&*!<>|-? \n'\"#%@`sm0.", max_size=40))
def test_text_as_params(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert refused(lambda: settings_of(path))


SETTINGS = JSON | st.dictionaries(FIELDS, JSON, max_size=3)


@many
@given(st.dictionaries(FIELDS, JSON, max_size=4), SETTINGS, SETTINGS)
@example({"rate": 10**400}, {}, {})
@example({"steps": 1}, {"s": {1: 2}}, {"s": {"flag": 1}})
def test_values_as_params(tmp_path: Path, section: dict[str, Any], task: Any, method: Any) -> None:
    path = tmp_path / "params.yaml"
    content = {"s": section, "task": {"t": task}, "made_by": {"g": {"m": method}}}
    path.write_text(yaml.dump(content), encoding="utf-8")
    refused(lambda: settings_of(path))


@pytest.mark.parametrize(
    "text",
    [
        "s: !!int ''",
        "s: !!bool x",
        "s: !!timestamp x",
        "s: 2001-99-99",
        "s: !!python/object/apply:os.system ['touch PWNED']",
        "s: " + "[" * 1500,
        "s: " + "9" * 5000,
        "s: &a {rate: *a}",
        # Nine times nine times ... : harmless as a structure, endless as a text.
        "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
        + "\ns: {rate: *a11}",
    ],
)
def test_yaml_that_python_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(text)
    assert refused(lambda: settings_of(Path("params.yaml")))
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


# --- examples -----------------------------------------------------------------------------------------------------


def examples_of(path: Path) -> None:
    """What commands do with example files: read them as examples, or as rows of a benchmark, and write them."""
    for found in read_examples(path):
        json.dumps(found.to_row(), ensure_ascii=False).encode()


def rows_of(path: Path) -> None:
    for number, row in read_jsonl(path):
        for task in map(tasks.load, tasks.names()):
            for schema in task.schemas:
                refused(lambda task=task, row=row, schema=schema, n=number: task.example(row, str(n), schema))  # type: ignore[misc]


TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": JSON | st.text(max_size=9)})
ROW = st.fixed_dictionaries(
    {},
    optional={
        "messages": JSON | st.lists(TURN, max_size=3),
        "reference": JSON,
        **dict.fromkeys(("id", "dataset", "prefix", "question", "subject", "prompt", "code", "text"), JSON),
        "choices": st.lists(JSON, max_size=5),
        "answer": JSON | st.integers(-9, 9),
        "test_list": JSON,
    },
)


@many
@given(st.binary(max_size=80))
def test_bytes_are_no_examples(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(content)
    assert refused(lambda: examples_of(path))
    refused(lambda: rows_of(path))


@many
@given(st.lists(JSON | ROW, max_size=3))
@example([{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]}])
def test_any_json_as_examples(tmp_path: Path, rows: list[Any]) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    refused(lambda: examples_of(path))
    refused(lambda: rows_of(path))


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 1: not JSON ("),
        ('{"id": ' + "9" * 5000 + "}", "line 1: not JSON ("),
        (json.dumps(GOOD | {"id": "\ud800"}), "line 1: not JSON ("),
        (json.dumps(GOOD | {"reference": 5}), "line 1: `reference` is int; expected an object of texts"),
        (json.dumps(GOOD | {"reference": {"answer": 5}}), "line 1: `reference` holds int as 'answer'; expected text"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(line)
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}, {message}")


# --- answers ------------------------------------------------------------------------------------------------------


@many
@given(
    st.text(max_size=60) | st.text(string.digits + "+-.,$eE /_", max_size=40),
    st.text(string.digits + ".,$-eENans", max_size=9),
)
@example("1e999999999", "1")
@example("", "sNaN")
@example("1", "sNaN")
def test_a_number_is_found_or_not(text: str, answer: str) -> None:
    found = last_number(text)
    assert found == "" or any(letter.isdigit() for letter in found)
    assert scoring.same_number(found, answer) in (True, False)
    assert score(text, answer) in (0.0, 1.0)


@pytest.mark.parametrize("text", ["1," * 50_000, "9" * 100_000, "-$" * 50_000, "1." * 50_000, "," * 100_000 + "x"])
def test_long_answers_take_no_time(text: str) -> None:
    assert scoring.same_number(last_number(text), "7") is False


@many
@given(st.text(max_size=60), st.text("def f(x):\n @async\tclass", max_size=40))
def test_any_text_is_a_program_to_test(text: str, prefix: str) -> None:
    reference = {"code_prefix": prefix, "setup": "", "test_list": ["assert f(1)"], "test": "", "entry_point": "f"}
    for make in filter(None, (tasks.load(name).job for name in tasks.names())):
        assert make(reference, text).code == prefix + text
