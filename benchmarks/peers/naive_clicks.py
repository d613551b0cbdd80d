"""The click table as Faust's own examples would have it: a JSON list of each user's last 200 clicks.

``python -m benchmarks.peers.naive_clicks BROKERS TOPIC APP_ID FOLDER PARTITIONS`` in the environment of Faust.
"""

from __future__ import annotations

import sys
from typing import Any

import faust

CLICKS = 200


class Click(faust.Record, serializer="json"):  # type: ignore[misc]
    user_id: str
    note_id: str
    clicked_at: int


def main(brokers: str, topic: str, app_id: str, folder: str, partitions: str) -> None:
    app = faust.App(
        app_id, broker=f"kafka://{brokers}", store="rocksdb://", datadir=folder, web_enabled=False,
        topic_partitions=int(partitions), topic_replication_factor=1, topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
    )  # fmt: skip
    clicks = app.Table("clicks", default=list, partitions=int(partitions))
    source = app.topic(topic, key_type=str, value_type=Click)

    @app.agent(source)
    async def keep(stream: Any) -> None:
        async for click in stream:
            kept = clicks[click.user_id]
            seen = [click.note_id, click.clicked_at]
            if seen not in kept:
                kept.append(seen)
                clicks[click.user_id] = kept[-CLICKS:]

    faust.Worker(app, quiet=True, override_logging=False, redirect_stdouts=False).execute_from_commandline()


if __name__ == "__main__":
    main(*sys.argv[1:])
