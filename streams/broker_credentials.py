"""``kafka.properties`` are librdkafka's. Faust's consumer is another client: what it is told of them, and what not."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

from notellm.errors import SettingsError

__all__ = ["BrokerCredentials", "broker_credentials", "unheard_properties"]

_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_HEARD = {
    "security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.username", "sasl.password", "ssl.ca.location",
    "ssl.certificate.location", "ssl.key.location", "ssl.key.password", "ssl.endpoint.identification.algorithm",
}  # fmt: skip


class BrokerCredentials(NamedTuple):
    """No mechanism: encryption alone. No context: no encryption."""

    context: ssl.SSLContext | None
    mechanism: str = ""
    username: str = ""
    password: str = ""


def broker_credentials(properties: Mapping[str, Any]) -> BrokerCredentials | None:
    """None where connections are plain.

    Raises :class:`SettingsError` for a property without which Faust's consumer could not connect.
    """
    for name in sorted(properties):
        if name.startswith(("ssl.", "sasl.", "enable.ssl")) and name not in _HEARD:
            allowed = ", ".join(sorted(_HEARD))
            raise SettingsError(
                f"kafka.properties: {name}: the Faust worker cannot connect that way; it takes {allowed}"
            )
    protocol = str(properties.get("security.protocol", "PLAINTEXT")).upper()
    if protocol not in _PROTOCOLS:
        raise SettingsError(f"kafka.properties: security.protocol: {protocol!r}; allowed are {', '.join(_PROTOCOLS)}")
    context = _ssl_context(properties) if protocol.endswith("SSL") else None
    if protocol.startswith("SASL"):
        mechanism = str(properties.get("sasl.mechanism", properties.get("sasl.mechanisms", ""))).upper()
        if mechanism not in _MECHANISMS:
            raise SettingsError(
                f"kafka.properties: sasl.mechanism: {mechanism!r}; the Faust worker takes {', '.join(_MECHANISMS)}"
            )
        username, password = (str(properties.get(f"sasl.{name}", "")) for name in ("username", "password"))
        return BrokerCredentials(context, mechanism, username, password)
    return BrokerCredentials(context) if context is not None else None


def unheard_properties(properties: Mapping[str, Any]) -> list[str]:
    """They tune our own clients, and do not reach Faust's consumer; none of them is needed to connect."""
    return sorted(set(properties) - _HEARD)


def _ssl_context(properties: Mapping[str, Any]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=properties.get("ssl.ca.location"))
        if certificate := properties.get("ssl.certificate.location"):
            context.load_cert_chain(certificate, properties.get("ssl.key.location"), properties.get("ssl.key.password"))
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(f"kafka.properties: ssl.*.location: cannot be read: {error}") from None
    if str(properties.get("ssl.endpoint.identification.algorithm", "https")).lower() == "none":
        context.check_hostname = False
    return context
