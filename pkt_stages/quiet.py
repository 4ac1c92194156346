"""Importing DVC sets up logging; here that is taken back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

LOGGERS = ("dvc", "dvc_objects", "dvc_data", "asyncio", "aiohttp")


@contextlib.contextmanager
def quiet_dvc() -> Iterator[None]:
    """Use DVC, or what imports it, without its log; afterwards its loggers are as before.

    DVC's import gives them handlers on the streams of that moment, for as long as the process lives, whatever becomes
    of the streams; and its progress bars would write between our lines.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    try:
        import dvc  # noqa: F401

        for logger in loggers:
            logger.handlers = []
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.handlers = handlers
            logger.setLevel(level)
