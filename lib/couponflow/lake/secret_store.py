"""The only door to Secret Manager: one version of one secret, read by a driver as the account of its node.

A version is named by its number: what ``latest`` names changes, and with another key every user would become
somebody else. The bytes are held by the caller alone and are part of no message. The environment variable
``COUPONFLOW_SECRETS_ENDPOINT`` names a stand-in on this machine; it gets no credentials.
"""

import base64
import os
import re
from typing import Any

from couponflow.errors import ConfigError, InfraError

STAND_IN = "COUPONFLOW_SECRETS_ENDPOINT"
_SERVICE = "https://secretmanager.googleapis.com"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_SECONDS = 30
_ATTEMPTS, _FIRST_PAUSE_SECONDS = 5, 0.2
_PASSING = (408, 429, 500, 502, 503, 504)


def read(version: str) -> bytes:
    """The bytes of ``projects/P/secrets/S/versions/N``, without a line break at their end.

    Raises:
        ConfigError: there is no such version, or it is disabled; or the stand-in is on another machine.
        InfraError: nobody is logged in, the account may not read it, or the service did not answer.
    """
    import google_crc32c
    import requests
    from google.auth.exceptions import GoogleAuthError

    try:
        session, service = _session()
        answer = _asked(session, f"{service}/v1/{version}:access")
    except (GoogleAuthError, requests.RequestException) as error:
        raise InfraError(
            f"secret {version}: Secret Manager did not answer ({type(error).__name__}); check the login and "
            "the network, and run again"
        ) from error
    if answer.status_code in (401, 403):
        raise InfraError(
            f"secret {version}: refused; the account of this node needs roles/secretmanager.secretAccessor "
            "on it (deploy/iam/setup.sh grants that)"
        )
    if answer.status_code in (400, 404):
        raise ConfigError(f"secret {version}: no such version, or it is disabled; correct events.key_secret")
    if answer.status_code != 200:
        raise InfraError(f"secret {version}: Secret Manager answered {answer.status_code}; run again")
    payload = answer.json()["payload"]
    content = base64.b64decode(payload["data"])
    if google_crc32c.value(content) != int(payload["dataCrc32c"]):
        raise InfraError(f"secret {version}: arrived damaged; run again")
    return content.rstrip(b"\r\n")


def _session() -> tuple[Any, str]:
    """As the account of this machine, and the service's address."""
    import google.auth
    import requests
    from google.auth.transport.requests import AuthorizedSession

    stand_in = os.environ.get(STAND_IN, "")
    if stand_in:
        if not re.fullmatch(r"http://(127\.0\.0\.1|localhost):[0-9]+", stand_in):
            raise ConfigError(f"{STAND_IN}={stand_in}: a stand-in has to be on this machine; unset it")
        return requests.Session(), stand_in
    credentials, _ = google.auth.default(scopes=[_SCOPE])
    authorized: Any = AuthorizedSession  # untyped in the library
    return authorized(credentials), _SERVICE


def _asked(session: Any, url: str) -> Any:
    """The answer; what passes by itself is asked again, at growing distances."""
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    again = Retry(
        _ATTEMPTS, status_forcelist=_PASSING, backoff_factor=_FIRST_PAUSE_SECONDS, raise_on_status=False
    )
    session.mount(url, HTTPAdapter(max_retries=again))
    return session.get(url, timeout=_SECONDS)
