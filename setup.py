"""The two parts of the metadata that depend on where the source lies: the project's address, and README's links.

Everything else is in pyproject.toml. The address is `REPOSITORY` or else the remote `origin` of the checkout, if that
is on the web; a source distribution keeps the one that it was made with. With an address README's links and
pictures point there. Without one links become plain text and pictures are left out: relative ones are dead on an index.
"""

import re
import subprocess
from email.parser import HeaderParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REPOSITORY = ""  # such as https://host/owner/urform, once there is a public one
ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")
PICTURE = re.compile(r'(<img [^>]*src=")(?![a-z]+:)([^"]+)("[^>]*>)')


def repository() -> str:
    """Return the project's address on the web, or an empty string."""
    if REPOSITORY:
        return REPOSITORY
    if (ROOT / "PKG-INFO").is_file():  # a source distribution
        said = HeaderParser().parsestr((ROOT / "PKG-INFO").read_text(encoding="utf-8"))
        urls = [value.partition(", ") for value in said.get_all("Project-URL", [])]
        return next((url for label, _, url in urls if label == "Repository"), "")
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return web_address(done.stdout.strip())


def web_address(remote: str) -> str:
    """Return the https address of a git remote, without a user or password that it names; "" for a path."""
    match = re.fullmatch(
        r"(?:https?://(?:[^/@]*@)?|(?:ssh://)?git@)([\w.-]+\.\w+)(?::\d+)?[/:](.+?)(?:\.git)?/?", remote
    )
    return f"https://{match[1]}/{match[2]}" if match else ""


def long_description(text: str, address: str) -> str:
    """Return README with links and pictures that work elsewhere; without an address it has no pictures."""
    text = PICTURE.sub(rf"\1{address}/raw/HEAD/\2\3" if address else "", text)
    return LINK.sub(rf"[\1]({address}/blob/HEAD/\2)" if address else r"\1", text)


class BuildModules(build_py):
    """Leaves this file out: the folder that it lies in is the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, file) of every module of a package."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


if __name__ == "__main__":
    address = repository()
    pages = {"Repository": "", "Documentation": "/tree/HEAD/docs", "Changelog": "/blob/HEAD/CHANGELOG.md"}
    setup(
        cmdclass={"build_py": BuildModules},
        long_description=long_description((ROOT / "README.md").read_text(encoding="utf-8"), address),
        long_description_content_type="text/markdown",
        project_urls={label: address + page for label, page in pages.items()} if address else {},
    )
