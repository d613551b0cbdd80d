"""``python -m tests.support.updater '{"model_version": ...}'``: ``notellm update`` with a test encoder in its process.

Settings come from the environment, as they do for the real command.
"""

from __future__ import annotations

import sys

import msgspec

from commands.console import fail, log_to_console
from commands.update import UpdaterService
from consumers.encoder_process import EncoderProcess
from notellm.errors import NoteLLMError
from notellm.settings import load_settings
from tests.support.encoders import HOSTILE


def main(arguments: str) -> None:
    log_to_console()
    try:
        settings = load_settings()
        UpdaterService(settings).run(
            lambda: EncoderProcess(
                HOSTILE,
                msgspec.json.decode(arguments),
                memory_limit_mb=settings.encoder.memory_limit_mb,
                answer_timeout_s=settings.encoder.answer_timeout_s,
            )
        )
    except NoteLLMError as error:
        fail(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
