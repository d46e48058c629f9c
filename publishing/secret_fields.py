"""Which settings are secrets, so that they are never written or shown: `without_secrets`, `hide_tokens`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .secret_patterns import find_secret

# What transformers masks when it shows TrainingArguments.
_TOKEN = re.compile(r"\w+_token")
# Names of secrets in any section; tokens of a vocabulary (`pad_token`, `tokens_per_batch`) are none.
_NAME = re.compile(
    r"(.*[_-])?(api|access|secret|private|auth|wandb|client)[_-]?(key|token)|(use_auth|auth|hub|hf|push_to_hub)_token|token"
    r"|(.*[_-])?(secret|password|passwd|passphrase|credentials?)",
    re.IGNORECASE,
)


class SecretToken(str):
    """A token that is None where it is pickled and hidden where it is shown by `repr`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __repr__(self) -> str:
        return "<token>"

    def __copy__(self) -> SecretToken:
        return self

    def __deepcopy__(self, memo: Any) -> SecretToken:
        return self


def hide_tokens(arguments: Any) -> None:
    """Make a `SecretToken` of every token of `TrainingArguments`."""
    for name, value in vars(arguments).items():
        if value and isinstance(value, str) and _TOKEN.fullmatch(name):
            setattr(arguments, name, SecretToken(value))


def without_secrets(values: Mapping[str, Any], section: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return nested settings without their secrets, and the dotted names of those left out.

    A setting is a secret by its name, or if its value looks like a token or an address with a password.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in values.items():
        path = f"{section}.{name}" if section else str(name)
        by_name = _NAME.fullmatch(str(name)) or (section == "training" and _TOKEN.fullmatch(str(name)))
        if value and (by_name or _holds_secret(value)):
            left_out.append(path)
        elif isinstance(value, Mapping):
            kept[name], more = without_secrets(value, path)
            left_out += more
        else:
            kept[name] = value
    return kept, left_out


def _holds_secret(value: Any) -> bool:
    if isinstance(value, str):
        return find_secret(value) is not None
    return isinstance(value, (list, tuple)) and any(_holds_secret(item) for item in value)
