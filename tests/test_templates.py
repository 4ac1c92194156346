"""Chat templates of strangers: each ends soon, in a prompt or in one line, and is the same on every day."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pkt_stages import templates
from pkt_stages.errors import UserError
from pkt_stages.templates import TODAY, dated, render_prompt
from tests.conftest import CHAT_TEMPLATE, save_tokenizer

END = r"; choose tulu, llama2 or none$"


@pytest.fixture(autouse=True)
def _anew() -> None:
    """No test sees what another one was warned of."""
    templates._warn.cache_clear()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    made = save_tokenizer(tmp_path)
    made.name_or_path = "a/model"
    return made


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('a system turn must come first') }}", "TemplateError: a system turn must come first"),
        ("{{ messages[5].content }}", "UndefinedError: list object has no element 5"),
        ("{% for %}", "TemplateSyntaxError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ messages|tojson|nosuch }}", "TemplateAssertionError: "),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{% include 'other' %}", "TypeError: no loader for this environment specified"),
        ("{{ strftime_now(3) }}", "TypeError: "),
        ({"tool_use": "{{ 1 }}"}, "ValueError: This model has multiple chat templates with no default specified! "),
    ],
)
def test_what_a_template_raises_is_one_line(tokenizer: Any, source: Any, reason: str) -> None:
    tokenizer.chat_template = source
    with pytest.raises(
        UserError, match=rf"^template 'chat': that of a/model fails for one user turn \({reason}.*{END}"
    ):
        render_prompt(tokenizer, "chat", "2+2?")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ f(30) }}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set x = 10**(10**12) %}",  # which Jinja tries while it compiles, too
        # Behind a condition on the text, so that no look at another prompt would have seen it.
        "{% if '2' in messages[0].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}{{ messages[0].content }}",
    ],
)
def test_a_template_without_end(tokenizer: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 1)
    tokenizer.chat_template = source
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf"^template 'chat': that of a/model needs more than 1 s{END}"):
        render_prompt(tokenizer, "chat", "2+2?")
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**11 }}",
        "{{ 'x'|center(10**11) }}",
        "{{ '%99999999999d' % 1 }}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    ],
)
def test_a_template_that_eats_memory(tokenizer: Any, source: str) -> None:
    tokenizer.chat_template = source
    with pytest.raises(UserError, match=rf"^template 'chat': that of a/model needs more than 1024 MiB{END}"):
        render_prompt(tokenizer, "chat", "2+2?")


def test_a_template_that_writes_too_much(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content * 300000 }}"
    with pytest.raises(UserError, match=rf"^template 'chat': that of a/model makes 1200000 characters of 4{END}"):
        render_prompt(tokenizer, "chat", "2+2?")


@pytest.mark.parametrize(
    "source",
    [
        "hello",
        "{{ messages[0].content|upper }}!",
        "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_loses_the_prompt(tokenizer: Any, source: str) -> None:
    tokenizer.chat_template = source
    with pytest.raises(UserError, match=r"^template 'chat': that of a/model changes the user's text or leaves it out"):
        render_prompt(tokenizer, "chat", "two and two?")


def test_bounds_end_with_the_rendering(tokenizer: Any) -> None:
    before = (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM), random.getstate())
    render_prompt(tokenizer, "chat", "2+2?")
    tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(UserError):
        render_prompt(tokenizer, "chat", "2+2?")
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM), random.getstate()) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@pytest.mark.parametrize(
    ("source", "today"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% set now = strftime_now %}{{ now('%A') }}", "Friday"),
        ("{% macro day() %}{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% endmacro %}{{ day() }}", "2024-07-26 00:00:00"),
        ("{% if strftime_now is defined %}{{ strftime_now('%s')|int > 0 }}{% endif %}", "True"),
    ],
)
def test_it_is_always_the_same_day(
    tokenizer: Any, source: str, today: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.chat_template_utils as library

    monkeypatch.setattr(library, "datetime", None)  # the library's own clock is not asked
    tokenizer.chat_template = source + " {{ messages[0].content }}"
    for _ in range(2):
        assert render_prompt(tokenizer, "chat", "2+2?") == f"{today} 2+2?"
    assert dated(tokenizer, "chat") == {"template_date": "2024-07-26"}
    assert dated(tokenizer, "tulu") == {}
    line = "the chat template of a/model asks for today's date; it is told 2024-07-26 on every day"
    assert capsys.readouterr().err == f"pkt: warning: {line}\n"


def test_other_templates_have_no_date(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.chat_template = "{% if false %}{{ strftime_now('%Y') }}{% endif %}{{ messages[0].content }}"
    assert render_prompt(tokenizer, "chat", "2+2?") == "2+2?"
    assert dated(tokenizer, "chat") == {}
    assert capsys.readouterr().err == ""


def test_a_template_that_draws_draws_the_same(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ range(1000)|list|random }} {{ lipsum(1) }} {{ messages[0].content }}"
    found = set()
    for seed in range(3):
        random.seed(seed)
        found.add(str(render_prompt(tokenizer, "chat", "2+2?")))
    assert len(found) == 1


def test_a_byte_order_mark_before_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "\ufeff" + CHAT_TEMPLATE
    assert render_prompt(tokenizer, "chat", "2+2?") == "<s><|user|>\n2+2?\n<|assistant|>\n"


def test_the_date_stands_in_what_is_made(pkt: Any, target_folder: Path, extract_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(target_folder, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("Today: {{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE)
    out = tmp_path / "scores.safetensors"
    status, _, err = pkt("attribute", "--model", model, "--extract", extract_file, "--out", out)
    assert (status, err.count("pkt: warning: ")) == (0, 1)
    meta = json.loads(pkt("inspect", out, "--json")[1])["meta"]
    assert meta["template_date"] == f"{TODAY:%Y-%m-%d}"
