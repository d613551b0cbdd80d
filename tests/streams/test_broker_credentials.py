"""What Faust's consumer is told of kafka.properties, and what stops the start."""

from __future__ import annotations

import pytest

from notellm.errors import SettingsError
from streams.broker_credentials import broker_credentials, unheard_properties


def test_plain_connections_need_none() -> None:
    assert broker_credentials({}) is None
    assert broker_credentials({"security.protocol": "plaintext", "linger.ms": 5}) is None


def test_a_password_over_an_encrypted_connection() -> None:
    found = broker_credentials(
        {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": "me",
            "sasl.password": "secret",
        }
    )
    assert found is not None
    assert found[1:] == ("SCRAM-SHA-512", "me", "secret")
    assert found.context is not None
    assert found.context.check_hostname


def test_a_password_in_the_clear() -> None:
    found = broker_credentials({"security.protocol": "SASL_PLAINTEXT", "sasl.mechanisms": "PLAIN"})
    assert found is not None
    assert found.context is None
    assert found.mechanism == "PLAIN"


def test_encryption_alone_without_the_host_name() -> None:
    found = broker_credentials({"security.protocol": "SSL", "ssl.endpoint.identification.algorithm": "none"})
    assert found is not None
    assert found.context is not None
    assert not found.context.check_hostname


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"sasl.oauthbearer.config": "x"}, "sasl.oauthbearer.config"),
        ({"ssl.keystore.location": "x"}, "ssl.keystore.location"),
        ({"security.protocol": "TLS"}, "'TLS'; allowed are PLAINTEXT"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI"}, "'GSSAPI'; the Faust worker takes PLAIN"),
        ({"security.protocol": "SSL", "ssl.ca.location": "/absent"}, "cannot be read"),
    ],
)
def test_what_it_could_not_connect_with_is_refused(properties: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        broker_credentials(properties)


def test_the_rest_is_for_the_other_clients() -> None:
    assert unheard_properties({"linger.ms": 5, "sasl.username": "me"}) == ["linger.ms"]
