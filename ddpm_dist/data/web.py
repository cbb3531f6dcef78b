"""Requests over http and https, as both indexing and training send them: what they carry, and whom they show it to.

Basic authorization is that of the URL, else that of the host in ``$NETRC`` (else ``~/.netrc``). It is sent to the host that is asked; after a
redirect only that of netrc is sent again, and only to the same scheme, host and port. An entry ``default`` is not used: it would show a
password to any server that an index names.
"""

from __future__ import annotations

import base64
import http.client
import netrc
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ddpm_dist.errors import UserError

PASSING_CODES = (408, 425, 429)  # answers that may be others later, as may everything from 500 on


def request(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> urllib.request.Request:
    """A request for ``url``, which may hold a user and password.

    Raises:
        UserError: the netrc cannot be used. ValueError: this is no URL.
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    # Only what may not stand in a URL is quoted; what is quoted already stays as it is.
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
    made = urllib.request.Request(
        urlunsplit((parts.scheme, host, path, parts.query, "")), headers=headers or {}, method=method
    )
    made.add_header("User-Agent", "ddpm_dist")
    made.add_header("Accept-Encoding", "identity")
    if at:
        made.add_unredirected_header("Authorization", basic(unquote(user)))
    elif token := login_for(parts.hostname):
        _authorize(made, token)
    return made


def _authorize(made: urllib.request.Request, token: str) -> None:
    made.add_unredirected_header("Authorization", token)
    made.netrc_token = token


def send(made: urllib.request.Request, timeout: float) -> Any:
    """The answer, of which nothing is read yet. timeout: seconds for connecting and for each read. Raises what ``urlopen`` raises."""
    return urllib.request.build_opener(_SameHost).open(made, timeout=timeout)


def answered(code: int) -> str:
    """A server's refusal in words. The reason that came with it is not repeated: it may quote the address."""
    return f"the server answers {code} ({http.client.responses.get(code, 'unknown')})"


def basic(user: str) -> str:
    """The header for ``user:password``."""
    return f"Basic {base64.b64encode(user.encode()).decode('ascii')}"


def login_for(host: str | None) -> str | None:
    """The header for a host, from netrc; None where it has no entry. Raises UserError, without contents, where netrc cannot be used."""
    named = os.environ.get("NETRC")
    where = "the file that $NETRC names" if named else "~/.netrc"
    try:
        hosts = netrc.netrc(named or None).hosts  # of the default one Python also looks at who else may read it
    except FileNotFoundError:
        if not named:
            return None
        raise UserError(f"{where} does not exist") from None
    except netrc.NetrcParseError as error:
        if "permi" in error.msg or "owner" in error.msg:
            raise UserError(
                f"{where} holds passwords and must be yours and readable by nobody else (chmod 600)"
            ) from None
        raise UserError(f"{where} cannot be understood (near line {error.lineno})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'})") from None
    entry = {name.lower(): found for name, found in hosts.items() if name != "default"}.get((host or "").lower())
    return basic(f"{entry[0] or entry[1] or ''}:{entry[2] or ''}") if entry else None


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Sends what is from netrc on where a server redirects within itself."""

    def redirect_request(self, req: Any, *others: Any) -> Any:
        new, token = super().redirect_request(req, *others), getattr(req, "netrc_token", None)
        if new is not None and token and urlsplit(new.full_url)[:2] == urlsplit(req.full_url)[:2]:
            _authorize(new, token)
        return new
