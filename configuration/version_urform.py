# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Which Urform this is, what it needs, and whether a checkpoint was published by another one.

This is the part of a bundle's stamp that is read where a model is loaded, with or without Urform installed.
`publishing/bundle_stamp.py` writes the stamp itself and compares files with it.

- `VERSION` is the package's version; `urform.__version__` and pyproject.toml take it from here.
- `need_libraries` refuses transformers and torch that are too old for the code, before an import fails obscurely.
- `config.json` of a published checkpoint names in one key the Urform that published it. `unstamped` takes the key out
  when the config is read, and warns if the installed Urform is older or writes another format.
"""

import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

VERSION = "0.1.0"
CONFIG_KEY = "urform_bundle"
FORMAT = 1
NEEDS = {"torch": "2.11", "transformers": "5.17", "safetensors": "0.6"}


def package_version() -> str:
    """Return the version of the Urform that this module belongs to."""
    return VERSION


def need_libraries() -> None:
    """Check that the libraries installed here are new enough for Urform's code.

    Raises:
        ImportError: a library is too old; the message says which one and how to update it.
    """
    for name, least in NEEDS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # the import itself will say so
        if Version(found).release < Version(least).release:
            raise ImportError(
                f"this checkpoint's code needs {name}>={least}, and {found} is installed: "
                f"pip install -U '{name}>={least}'"
            )


def config_stamp(urform_version: str) -> dict[str, Any]:
    """Return what `config.json` says about the bundle."""
    return {"format": FORMAT, "urform": urform_version}


def unstamped(config_dict: dict[str, Any], installed: str | None) -> dict[str, Any]:
    """Return a config's dict without the stamp.

    Warn where the stamp and the `installed` version (None: a flat copy) differ so that the one may not know what the
    other wrote.
    """
    if CONFIG_KEY not in config_dict:
        return config_dict
    stamp = config_dict[CONFIG_KEY]
    if installed is not None:
        for line in version_warnings(stamp, installed):
            warnings.warn(line, UserWarning, stacklevel=4)
    return {key: value for key, value in config_dict.items() if key != CONFIG_KEY}


def version_warnings(stamp: Any, installed: str) -> Iterator[str]:
    """Yield a line for each way in which a bundle's stamp and the installed version do not go together."""
    try:
        published, layout = Version(stamp["urform"]), int(stamp["format"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"the checkpoint's stamp {stamp!r} cannot be read ({error}); it may have been published by another Urform"
        return
    if published > Version(installed):
        yield (
            f"this checkpoint was published with urform {published} and urform {installed} is installed, whose code is "
            "used: what is newer than it is not computed. Update urform, or load the checkpoint with its own code in a "
            "process that does not import urform (trust_remote_code=True)"
        )
    if layout != FORMAT:
        yield (
            f"this checkpoint is a bundle of format {layout} (urform {published}) and urform {installed} writes format "
            f"{FORMAT}: " + ("publish it again" if layout < FORMAT else "update urform")
        )
