"""What passwords, tokens and keys look like.

A pattern asks for the issuer's own prefix and length, and for a boundary before the prefix: hashes, base64 and the
vocabularies of tokenizers have neither. What has no prefix (W&B's hexadecimal keys, AWS's secret halves) is found by
the name of the field that holds it.
"""

from __future__ import annotations

import re

_SHAPES = {
    "a Hugging Face token": r"(?<![\w-])hf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z]{34}",
    "a GitHub token": r"(?<![\w-])gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,}",
    "a GitLab token": r"\bgl(?:pat|ptt|dt|rt|cbt|soat|agent)-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"(?<![\w-])(?:AIza[A-Za-z0-9_-]{35}(?![\w-])|GOCSPX-[A-Za-z0-9_-]{20,}|ya29\.[A-Za-z0-9_-]{30,})",
    "an Azure key": r"\b(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,}=",
    # OpenAI (sk-proj-, sk-svcacct-), Anthropic (sk-ant-), OpenRouter; a digit tells them from words with hyphens.
    "an API key": r"(?<![\w-])sk-(?=[A-Za-z_-]{0,200}\d)[A-Za-z0-9_-]{32,}"
    r"|(?<![\w-])(?:gsk_[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{60,}|r8_[A-Za-z0-9]{37}|pplx-[A-Za-z0-9]{40,}"
    r"|nvapi-[A-Za-z0-9_-]{60,})",
    "a Slack token": r"\bxox[abeoprs][.-][A-Za-z0-9.-]{10,}|\bxapp-\d-[A-Za-z0-9-]{20,}"
    r"|hooks\.slack\.com/services/T\w+/B\w+/\w{20,}",
    "a Stripe key": r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|\bwhsec_[A-Za-z0-9]{32,}",
    "a package index's token": r"(?<![\w-])pypi-AgE[A-Za-z0-9_-]{50,}|\bnpm_[A-Za-z0-9]{36}\b",
    "a token of a service": r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}\b|\bdckr_pat_[A-Za-z0-9_-]{27}"
    r"|\bdo[opr]_v1_[a-f0-9]{64}\b|\bdapi[a-f0-9]{32}\b|\bhv[sb]\.[A-Za-z0-9_-]{24,}|\b\d{8,10}:AA[A-Za-z0-9_-]{33}\b",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d",
    "a password in an address": r"""\b[a-z][a-z0-9+.-]{1,20}://[^/\s:@"'<>{}\[\],]{1,100}:[^/\s:@"'<>{}\[\],]{1,200}@""",
    "a secret": r"""(?i:api|secret|access|auth|private|hub)[_-]?(?i:key|token|secret)["']?\s{0,9}[:=]\s{0,9}["']?"""
    r"(?=[A-Za-z_+/.-]{0,200}\d)[A-Za-z0-9_+/=.-]{20,}",
}
_PATTERNS = {what: re.compile(shape) for what, shape in _SHAPES.items()}


def find_secret(text: str, own: str | None = None) -> tuple[str, int] | None:
    """Return what the first secret in a text looks like and its line, counted from 1; None if there is none.

    Args:
        text: to be looked through.
        own: a secret that is known, as the user's own token.
    """
    patterns = {"your own token": re.compile(re.escape(own)), **_PATTERNS} if own else _PATTERNS
    for what, pattern in patterns.items():
        if match := pattern.search(text):
            return what, text.count("\n", 0, match.start()) + 1
    return None
