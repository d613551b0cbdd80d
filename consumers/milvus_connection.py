"""A client of Milvus whose errors say what to do about them: try again, or look at the row."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from pymilvus import MilvusClient, MilvusException
from pymilvus.exceptions import DataNotMatchException, ParamError

from consumers.errors import CollectionGone, RowRefused, SinkUnavailable, UpdaterError
from notellm.settings import MilvusSettings

__all__ = ["COLLECTION_NOT_FOUND", "COLLECTION_NOT_LOADED", "UNEXPECTED", "connect", "is_lite", "milvus_errors"]

# pymilvus logs every failed call with its whole traceback; what matters of it is in the exception.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)

COLLECTION_NOT_FOUND = 100
COLLECTION_NOT_LOADED = 101
_DATABASE_NOT_FOUND = 800
# What a server says when it has no code for it.
UNEXPECTED = 65535
# "This row is wrong": 1100 invalid parameter on a server, 6 on Milvus Lite. All else may pass: try again.
_ROW_CODES = {6, 1100}


def connect(settings: MilvusSettings) -> MilvusClient:
    """Raises :class:`SinkUnavailable`, or :class:`UpdaterError` where trying again would not help."""
    try:
        return MilvusClient(
            settings.uri,
            token=settings.token.get_secret_value(),
            db_name=settings.database,
            timeout=settings.timeout_s,
            grpc_options={
                # Without its own pool a channel may go on failing for 12 s after the server is back.
                "grpc.use_local_subchannel_pool": 1,
                # pymilvus pings every 10 s, which Milvus Lite's gRPC server answers with "too many pings".
                "grpc.keepalive_time_ms": 300_000,
            },
        )
    except MilvusException as error:
        if _is_without_database(error):
            raise UpdaterError(
                f"milvus.database: {settings.database!r} is not on {settings.uri}; create it first"
            ) from None
        raise SinkUnavailable(f"milvus.uri: {settings.uri!r} cannot be reached: {_text(error)}") from None
    except (grpc.RpcError, ValueError) as error:
        raise SinkUnavailable(f"milvus.uri: {settings.uri!r} cannot be reached: {error}") from None


@contextmanager
def milvus_errors() -> Iterator[None]:
    """Turn what a call raises into :class:`SinkUnavailable`, :class:`RowRefused` or :class:`UpdaterError`.

    A collection that is not there is :class:`CollectionGone`.
    """
    try:
        yield
    except (DataNotMatchException, ParamError) as error:
        raise RowRefused(_text(error)) from error
    except MilvusException as error:
        if _is_without_database(error):
            raise UpdaterError(f"milvus.database: {_text(error)}; create it first") from error
        if error.code in _ROW_CODES:
            raise RowRefused(_text(error)) from error
        if error.code == COLLECTION_NOT_FOUND:
            raise CollectionGone(f"Milvus: {_text(error)}; start the updater again to create and fill it") from error
        raise SinkUnavailable(_text(error)) from error
    except grpc.RpcError as error:
        raise SinkUnavailable(str(error.code()) if hasattr(error, "code") else repr(error)) from error


def is_lite(client: MilvusClient) -> bool:
    """True for Milvus Lite, which takes one writer only."""
    return str(client.get_server_version()).startswith("milvus_lite")


def _is_without_database(error: MilvusException) -> bool:
    """By its text on Milvus Lite, which has no code of its own for it; and no row is to blame."""
    return error.code == _DATABASE_NOT_FOUND or _text(error).startswith("database ")


def _text(error: MilvusException) -> str:
    return (str(error.message) or type(error).__name__).splitlines()[0][:300]
