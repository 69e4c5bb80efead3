"""Lists the programs: ``python -m experiments``."""

import ast
from pathlib import Path


def programs() -> dict[str, str]:
    """Returns what each program does, by its name; nothing is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*")):
        source = path / "__main__.py" if path.is_dir() else path
        if source.suffix == ".py" and source.is_file():
            text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.splitlines()[0].split(": ``python")[0].rstrip(".")
    return found


def main() -> None:
    """Prints them."""
    listed = programs()
    width = max(map(len, listed))
    print("Run one with `python -m experiments.NAME`; `--help` lists its flags.\n")
    for name, summary in listed.items():
        print(f"  {name:{width}}  {summary}")


if __name__ == "__main__":
    main()
