"""Prompts as text: chat templates, rendered within bounds and on a fixed day, and what in a prompt is whose.

A chat template is a program that comes with a model. It gets no clock, no chance, little time and memory, and what it
raises is one line. What looks like a control token in an example's text is hidden from it, and a `Prompt` knows where
such text stands, so that `encoding.tokenize` takes it for text.
"""

from __future__ import annotations

import functools
import random
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pkt_stages.errors import UserError

Template = Literal["chat", "tulu", "llama2", "none"]

BUILT_IN: dict[str, tuple[str, str]] = {  # what stands around the prompt
    "tulu": ("<|user|>\n", "\n<|assistant|>\n"),
    "llama2": ("[INST] ", " [/INST] "),
    "none": ("", "\n"),
}
# What a chat template that asks for today's date is told: the day that Llama 3's names where there is no clock.
TODAY = datetime(2024, 7, 26)
# Of one rendering: seconds of computing, bytes of memory, characters beside ten times the prompt's.
MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS = 10, 1 << 30, 1_000_000
FIRST_STAND_IN = 0xF0000  # a plane of Unicode in which nothing is defined
STAND_INS = re.compile("([\U000f0000-\U000ffffd])\\1*")


class Prompt(str):
    """A prompt's text; what is added behind it is an example's.

    Attributes:
        foreign: where an example's text stands, [(start, end)]. In a chat template's output it is known only of what
            looks like a control token.
        markers: what the template writes and the tokenizer has as a token without calling it special.
    """

    foreign: tuple[tuple[int, int], ...]
    markers: frozenset[str]

    def __new__(
        cls, text: str, foreign: tuple[tuple[int, int], ...] = (), markers: frozenset[str] = frozenset()
    ) -> Prompt:
        made = super().__new__(cls, text)
        made.foreign, made.markers = foreign, markers
        return made

    def __add__(self, text: str) -> Prompt:
        whole = str(self) + text
        return Prompt(whole, (*self.foreign, (len(self), len(whole))), self.markers)

    def owns(self, found: re.Match[str]) -> bool:
        """Whether the template wrote all of this."""
        return all(found.end() <= start or end <= found.start() for start, end in self.foreign)


@dataclass(frozen=True)
class Controls:
    """The tokens that no example's text may become: BOS, EOS, those of roles and the like.

    Attributes:
        ids: by what they look like.
        pattern: finds what looks like one of them, the longest first.
        stand_ins: for each a text as long as it looks, which nobody writes.
    """

    ids: Mapping[str, int]
    pattern: re.Pattern[str]
    stand_ins: Mapping[str, str]


@functools.lru_cache(maxsize=8)
def controls(tokenizer: Any, markers: frozenset[str] = frozenset()) -> Controls:
    """The tokens that a tokenizer calls special, and a template's markers.

    Without those that look like a word or like space, which no text can do without.
    """
    added = {token.content: (id, token.special) for id, token in tokenizer.added_tokens_decoder.items()}
    ids = {text: id for text, (id, special) in added.items() if (special or text in markers) and _is_odd(text)}
    texts = sorted(ids, key=len, reverse=True)
    stand_ins = {text: chr(FIRST_STAND_IN + place) * len(text) for place, text in enumerate(texts)}
    return Controls(ids, re.compile("|".join(map(re.escape, texts)) or "(?!)"), stand_ins)


def _is_odd(text: str) -> bool:
    return re.search(r"[^\w\s]", text) is not None


def render_prompt(tokenizer: Any, template: Template, prompt: str) -> Prompt:
    """The text up to where the assistant's answer begins.

    `chat`: the tokenizer's own; `tulu`: open-instruct's; `llama2`: Llama-2's; `none`: the prompt and a newline.

    Raises:
        UserError: an unknown template; `chat` where the tokenizer has none, or one that fails, needs too much or leaves
            the prompt out.
    """
    if template == "chat":
        markers = _markers(tokenizer, template, str(tokenizer.chat_template))
        return _hidden(tokenizer, prompt, markers)
    if template not in BUILT_IN:
        raise UserError(f"unknown template {template!r}; expected one of {', '.join(get_args(Template))}")
    before, after = BUILT_IN[template]
    place = (len(before), len(before) + len(prompt))
    return Prompt(f"{before}{prompt}{after}", (place,), _markers(tokenizer, template, ""))


@functools.lru_cache(maxsize=8)
def _markers(tokenizer: Any, template: Template, chat_template: str) -> frozenset[str]:
    """What a template writes around a prompt that is a token which the tokenizer does not call special.

    Args:
        chat_template: the tokenizer's, which can be replaced.
    """
    written = _chat(tokenizer, "x")[0] if template == "chat" else "x".join(BUILT_IN[template])
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    return frozenset(text for text in added if _is_odd(text) and text in written)


def _hidden(tokenizer: Any, prompt: str, markers: frozenset[str]) -> Prompt:
    """The chat template's output for a prompt of which it does not see what looks like a control token."""
    known = controls(tokenizer, markers)
    if not known.pattern.search(prompt):
        return Prompt(_chat(tokenizer, prompt)[0], (), markers)
    check_free(tokenizer, prompt)
    written, _ = _chat(tokenizer, known.pattern.sub(lambda found: known.stand_ins[found[0]], prompt))
    looks = {stand_in[0]: text for text, stand_in in known.stand_ins.items()}
    text = STAND_INS.sub(lambda found: looks[found[1]] * (len(found[0]) // len(looks[found[1]])), written)
    return Prompt(text, tuple(found.span() for found in STAND_INS.finditer(written)), markers)


def check_free(tokenizer: Any, text: str) -> None:
    """Raise UserError unless stand-ins can be told from the text."""
    if found := STAND_INS.search(text):
        raise UserError(
            f"a text with control tokens of {tokenizer.name_or_path} and the undefined character"
            f" U+{ord(found[1]):X} ({text[max(0, found.start() - 30) : found.end() + 30]!r}): remove one of them"
        )


def _chat(tokenizer: Any, prompt: str) -> tuple[str, bool]:
    """The chat template's output, and whether it asked for today's date.

    Raises:
        UserError: there is no template, it fails, needs too much or leaves the prompt out.
    """
    name, instead = tokenizer.name_or_path, "choose tulu, llama2 or none"
    if not tokenizer.chat_template:
        raise UserError(f"template 'chat': the tokenizer of {name} has no chat template; {instead}")
    asked = []

    def strftime_now(form: str) -> str:
        asked.append(form)
        return TODAY.strftime(form)

    state = random.getstate()
    try:
        with _bounded():
            random.seed(0)  # for templates that draw
            text: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                chat_template=tokenizer.get_chat_template().removeprefix("\ufeff"),
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=strftime_now,
            )
    except MemoryError:
        raise UserError(f"template 'chat': that of {name} needs more than {MAX_BYTES >> 20} MiB; {instead}") from None
    except _TooLong:
        raise UserError(f"template 'chat': that of {name} needs more than {MAX_SECONDS} s; {instead}") from None
    except Exception as error:  # a template may raise whatever Python can
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"template 'chat': that of {name} fails for one user turn ({reason}); {instead}") from None
    finally:
        random.setstate(state)
    if len(text) > 10 * len(prompt) + MAX_CHARACTERS:
        raise UserError(f"template 'chat': that of {name} makes {len(text)} characters of {len(prompt)}; {instead}")
    if prompt.strip() not in text:
        raise UserError(f"template 'chat': that of {name} changes the user's text or leaves it out; {instead}")
    if asked:
        _warn(f"the chat template of {name} asks for today's date; it is told {TODAY:%Y-%m-%d} on every day")
    return text, bool(asked)


def dated(tokenizer: Any, template: Template) -> dict[str, str]:
    """For the metadata of what is made with a template: the date that it was told, if it asks for one."""
    asks = template == "chat" and _chat(tokenizer, "x")[1]
    return {"template_date": f"{TODAY:%Y-%m-%d}"} if asks else {}


@functools.cache
def _warn(message: str) -> None:
    """Say it on stderr, once in a process."""
    print(f"pkt: warning: {message}", file=sys.stderr)


class _TooLong(BaseException):
    """No Exception: Jinja passes over those of constant expressions."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Within the context this process computes for MAX_SECONDS at most and gets MAX_BYTES more of memory.

    Raises:
        _TooLong, MemoryError: it wants more. Only the main thread can be timed.
    """

    def stop(number: int, frame: Any) -> None:
        raise _TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")  # Linux has it
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES if statm.exists() else soft
    is_timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, stop) if is_timed else None
    try:
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, 1)
        yield
    finally:
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)  # None: not Python's
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
