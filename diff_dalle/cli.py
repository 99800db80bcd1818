"""The console command: `diff-dalle VERB ...` is `python scripts/VERB.py ...`."""

from __future__ import annotations

import importlib
import pkgutil
import sys

from diff_dalle.knobs import nearest


def verbs() -> list[str]:
    """The names of the scripts, in alphabetical order."""
    package = importlib.import_module("diff_dalle.scripts")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def main() -> int:
    """Run the script that the first argument names with the arguments that follow it."""
    names = verbs()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: diff-dalle VERB [flags]   (diff-dalle VERB --help shows them)")
        print("verbs: " + " ".join(names))
        return 0
    verb = sys.argv[1]
    if verb not in names:
        print(f"error: diff-dalle knows no verb {verb!r}{nearest(verb, names)}", file=sys.stderr)
        return 2
    sys.argv = [f"diff-dalle {verb}", *sys.argv[2:]]
    importlib.import_module(f"diff_dalle.scripts.{verb}").main()
    return 0
