"""Makes the virtual environment that the other scripts run in; needs Python's standard library
alone."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "scripts" / "constraints-cpu.txt"


def prepare(extra: str) -> Path:
    """Makes or updates ``.venv`` with this checkout and an extra; returns its Python.

    ``ROPEPP_PYTHON`` names another interpreter, whose environment is then used as it is;
    ``ROPEPP_CONSTRAINTS`` names a pip constraints file, such as scripts/constraints-oldest.txt.
    """
    given = os.environ.get("ROPEPP_PYTHON")
    if given:
        return Path(given)
    if sys.version_info < (3, 11):  # noqa: UP036 (any Python may start this)
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / f"installed-{extra}"
    gpu = shutil.which("nvidia-smi") is not None
    named = os.environ.get("ROPEPP_CONSTRAINTS")
    constraints = Path(named) if named else None if gpu else CPU
    versions = constraints.read_bytes() if constraints else b""
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + versions)
    wanted = f"{state.hexdigest()} gpu={gpu}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    print("installing (a few minutes the first time)", flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--editable", f"{ROOT}[{extra}]"]
    if constraints:
        command += ["--constraint", str(constraints)]
    subprocess.run(command, check=True)
    stamp.write_text(wanted)
    return python


def prepare_package(package: str) -> Path:
    """Makes an environment for a package whose pins conflict with ours, ``.venv-NAME``, with the
    same torch; returns its Python."""
    folder = ROOT / f".venv-{package.split('=')[0]}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == package:
        return python
    torch = next(line for line in CPU.read_text().splitlines() if line.startswith("torch=="))
    print(f"making {folder.relative_to(ROOT)} (a few minutes)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, package, torch], check=True)
    stamp.write_text(package)
    return python


def run(python: Path, *args: str) -> None:
    """Runs Python in the checkout with these arguments; ends this script with the code of a
    failure."""
    code = subprocess.run([str(python), *args], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)
