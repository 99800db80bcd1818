"""Print the map of the files that stands in README.md, one line a file.

python scripts/print_file_map.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("diff_dalle", "scripts", "benchmarks")


def file_map() -> str:
    """Each Python file with the first line of its docstring."""
    lines = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda p: (p.parent, p.name)):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = text.splitlines()[0].rstrip(".") if text else ""
            if path.name != "__init__.py":
                lines.append(f"{path.relative_to(ROOT).as_posix():<44} {first}")
    return "\n".join(lines)


def main() -> None:
    print(file_map())


if __name__ == "__main__":
    main()
