from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from pkt_stages.quiet import quiet_dvc


def test_loggers_are_as_before_and_silent_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stream was there when somebody imported DVC."""
    logger, closed = logging.getLogger("dvc"), io.StringIO()
    closed.close()
    handler = logging.StreamHandler(closed)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    with quiet_dvc():
        logging.getLogger("dvc.repo").error("not heard")
        assert logger.handlers == []
    assert logger.handlers == [handler] and logger.level == logging.DEBUG


def test_a_first_import_leaves_no_handlers() -> None:
    code = (
        "import logging\nfrom pkt_stages.quiet import LOGGERS, quiet_dvc\n"
        "with quiet_dvc():\n    import dvc.repo\n"
        "print([(name, logging.getLogger(name).handlers, logging.getLogger(name).level) for name in LOGGERS])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = ("dvc", "dvc_objects", "dvc_data", "asyncio", "aiohttp")
    assert said == f"{[(name, [], logging.NOTSET) for name in names]}\n"
