"""`make audit`: every installed package against the list of known vulnerabilities, by pip-audit in its own environment.

python -m scripts.audit

Needs pypi.org: pip-audit asks its JSON interface, which a mirror of packages alone does not have. A package that cannot
be looked up fails the audit: silence is no finding.
"""

import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

OWN = "mfm-ray"


def requirements(installed: Iterable[tuple[str, str]]) -> list[str]:
    """`name==version` lines as the public index knows them: without this project, and without the local part of a
    version, such as +cpu of torch."""
    named = {(name.lower().replace("_", "-"), version.partition("+")[0]) for name, version in installed}
    return [f"{name}=={version}" for name, version in sorted(named) if name != OWN]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "venv", with_pip=True)
        python = str(place / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-input", "pip-audit>=2.9"], check=True)
        found = ((package.metadata["Name"], package.version) for package in metadata.distributions())
        listed = place / "requirements.txt"
        listed.write_text("\n".join(requirements(found)) + "\n")
        audit = [python, "-m", "pip_audit", "--strict", "--disable-pip", "--no-deps", "-r", str(listed)]
        return subprocess.run(audit).returncode


if __name__ == "__main__":
    sys.exit(main())
