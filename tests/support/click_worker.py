"""Faust workers as processes, in the environment that Faust has to itself, with a way to make them slow or fail.

``python -m tests.support.click_worker`` is ``python -m streams.app``, settings from the environment, but for

- ``TEST_SECONDS_PER_CLICK``: sleeps so long at each record, so that a test can kill it in the middle;
- ``TEST_FAIL_ON``: raises at a record whose value has these words in it.

``python -m tests.support.click_worker rows FOLDER`` prints what a worker that has stopped has on its disk, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support.processes import CommandProcess

__all__ = ["PYTHON", "ClickWorkerProcess", "rows_on_disk"]

_REPOSITORY = Path(__file__).parent.parent.parent
PYTHON = _REPOSITORY / ".venv-streams" / "bin" / "python"


class ClickWorkerProcess(CommandProcess):
    def __init__(
        self, log: Path, environment: Mapping[str, str], *, module: str = "tests.support.click_worker"
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(PYTHON), "-m", module],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=_REPOSITORY,
                env={**os.environ, "NOTELLM_STREAMS_PORT": "0", **environment},
            )

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Until it ends by itself; its exit status."""
        return self._process.wait(seconds)


def rows_on_disk(folder: Path) -> dict[bytes, bytes]:
    """Of all partitions. No worker may be using the folder."""
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.support.click_worker", "rows", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=_REPOSITORY,
    )
    return {bytes.fromhex(key): bytes.fromhex(row) for key, row in json.loads(done.stdout).items()}


def _print_rows(folder: str) -> None:
    import rocksdb

    rows = {}
    for database in Path(folder).glob("**/clicks-*.db"):
        items = rocksdb.DB(str(database), rocksdb.Options(create_if_missing=False), read_only=True).iteritems()
        items.seek_to_first()
        # Beside the rows stand keys of Faust's and ours, which begin with "__".
        rows.update({key.hex(): row.hex() for key, row in items if not key.startswith(b"__")})
    sys.stdout.write(json.dumps(rows))


def _run() -> None:
    from notellm.settings import load_settings
    from streams.app import Handle, run
    from streams.kafka_writers import Source

    pause_s, fail_on = float(os.environ.get("TEST_SECONDS_PER_CLICK", "0")), os.environ.get("TEST_FAIL_ON", "").encode()

    def wrap(handle: Handle) -> Handle:
        def slow_or_failing(record: Source, timestamp_ms: int) -> None:
            time.sleep(pause_s)
            if fail_on and fail_on in (record.value or b""):
                raise TypeError("a test made this worker fail")
            handle(record, timestamp_ms)

        return slow_or_failing

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.WARNING)
    run(load_settings(), wrap)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rows"]:
        _print_rows(sys.argv[2])
    else:
        _run()
