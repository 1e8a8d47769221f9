"""Personal and secret data replaced by placeholders: e-mail addresses, public IP addresses, keys and tokens.

Rules find what has a form of its own and leave the rest; they are no guarantee of privacy. Private and reserved
addresses (127.0.0.1, 10.0.0.0/8, documentation ranges) name nobody and stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address

EMAIL, IP, KEY = "<email>", "<ip>", "<key>"

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]{1,10000}?-----END [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_\w{22,255}\b|\bglpat-[\w-]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bhf_[A-Za-z0-9]{30,}\b|\bAIza[\w-]{35}"
    r"|\bxox[abposr]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
)
_KEY_SIGNS = ("-----BEGIN", "AKIA", "ASIA", "gh", "glpat-", "sk-", "hf_", "AIza", "xox", "eyJ")


def mask_emails(text: str) -> str:
    """E-mail addresses replaced by `EMAIL`."""
    return _EMAIL.sub(EMAIL, text) if "@" in text else text


def mask_addresses(text: str) -> str:
    """IPv4 and IPv6 addresses that are routed publicly replaced by `IP`."""
    if "." in text:
        text = _IPV4.sub(_mask_public, text)
    return _IPV6.sub(_mask_public, text) if ":" in text else text


def _mask_public(match: re.Match[str]) -> str:
    try:
        return IP if ip_address(match[0]).is_global else match[0]
    except ValueError:
        return match[0]


def mask_keys(text: str) -> str:
    """Private keys, access keys and tokens of known forms replaced by `KEY`."""
    return _KEY.sub(KEY, text) if any(sign in text for sign in _KEY_SIGNS) else text


MASKS: dict[str, Callable[[str], str]] = {"email": mask_emails, "ip": mask_addresses, "key": mask_keys}
