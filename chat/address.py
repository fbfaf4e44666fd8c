"""Where another server is: `Address.parse("http://gpu-box:8000/v1")` judges a URL and takes it apart. Standard library."""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from chat.engine import BadRequest


@dataclass(frozen=True)
class Address:
    """`base` is what OpenAI's paths follow, without a slash at its end; `root` the same without /v1."""

    base: str
    root: str
    name: str  # host and port, for a person
    loopback: bool
    encrypted: bool

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises BadRequest with what is wrong. A key or a password does not belong into a URL: others see it in `ps`."""
        try:
            parts = urlsplit(url.strip())
            port = parts.port
        except ValueError as exc:
            raise BadRequest(
                "--url is {url}, which is no address: give one such as http://host:8000/v1.", url=repr(url)
            ) from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadRequest("--url is {url}, which is no address: give one such as http://host:8000/v1.", url=repr(url))
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise BadRequest("--url may hold no name, password or question: keys come from CHAT_API_KEY in the environment.")
        base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(
            base=base,
            root=base.removesuffix("/v1"),
            name=f"{host}:{port}" if port else host,
            loopback=_loopback(parts.hostname),
            encrypted=parts.scheme == "https",
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
