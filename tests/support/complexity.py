"""Hold every function of the package to 15 branches, as radon counts them.

    python tests/support/complexity.py    # `make lint` runs it in the repository's root

radon also counts `and`, `or`, conditional expressions and comprehensions; ruff's C901 does not. Tests are left out:
there every `assert` counts.
"""

import json
import subprocess
import sys
from collections.abc import Iterator

MOST = 15
MOST_OF_AN_EXCEPTION = 25
MOST_EXCEPTIONS = 8
# File and function -> why it is better in one piece. None may lie in `modeling/` outside of `modeling/kernels/`.
EXCEPTIONS: dict[str, str] = {
    "modeling/kernels/triton/attention_triton_backward.py:attention_backward_dq": "a Triton kernel is one program",
}


def measure() -> dict[str, int]:
    """Return the complexity of every function over the limit, by file and name."""
    command = [sys.executable, "-m", "radon", "cc", "--json", "--exclude", "build/*,tests/*,.venv*", "."]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for file, blocks in json.loads(done.stdout).items():
        if "error" in blocks:
            raise ValueError(f"{file}: radon cannot read it: {blocks['error']}")
        for block in blocks:
            if block["type"] != "class" and block["complexity"] > MOST:
                name = ".".join(filter(None, (block.get("classname"), block["name"])))
                found[f"{file}:{name}"] = block["complexity"]
    return found


def complaints(found: dict[str, int], exceptions: dict[str, str]) -> Iterator[str]:
    """Yield what breaks a rule, given the functions over the limit and the exceptions."""
    for name, complexity in found.items():
        if name not in exceptions:
            yield f"{name}: complexity {complexity}, at most {MOST}: split what decides from what computes"
        elif complexity > MOST_OF_AN_EXCEPTION:
            yield f"{name}: complexity {complexity}; an exception has at most {MOST_OF_AN_EXCEPTION}"
    for name in exceptions:
        if name not in found:
            yield f"{name}: no function over {MOST} any more; take it off EXCEPTIONS"
        if name.startswith("modeling/") and not name.startswith("modeling/kernels/"):
            yield f"{name}: no exception may lie in modeling/ above the kernels"
    if len(exceptions) > MOST_EXCEPTIONS:
        yield f"{len(exceptions)} exceptions; at most {MOST_EXCEPTIONS}"


if __name__ == "__main__":
    lines = list(complaints(measure(), EXCEPTIONS))
    print("\n".join(lines) or f"radon: no function over {MOST}, but for {len(EXCEPTIONS)} exceptions")
    sys.exit(bool(lines))
