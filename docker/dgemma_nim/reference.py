"""The tables of `docker/README.md`, from the tables that the code uses.

python -m dgemma_nim.reference docker/README.md    writes them in place; a test holds the file to it
"""

from __future__ import annotations

import sys
from pathlib import Path

from dgemma_nim.settings import SETTINGS
from dgemma_nim.variables import OTHERS, PASSED_ON


def settings_table() -> str:
    """Every setting: variables, flags, default."""
    rows = ["| setting | variables | command line | default | meaning |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        variables = ", ".join(f"`{name}`" for name in setting.variables) or "-"
        flags = ", ".join(f"`{flag}`" for flag in (*setting.flags, *setting.off))
        rows.append(f"| `{setting.name}` | {variables} | {flags} | {_default(setting.default)} | {setting.meaning} |")
    return "\n".join(rows)


def others_table() -> str:
    """Every variable of NIM that sets nothing here."""
    rows = ["| variable | what happens | because |", "|---|---|---|"]
    for name, plain in PASSED_ON.items():
        rows.append(f"| `{name}` | passed on as `{plain}` | OpenTelemetry reads it |")
    for other in sorted(OTHERS, key=lambda each: not each.refused):
        happens = "refused, unless it says what is so anyway" if other.refused else "a line in the log"
        rows.append(f"| `{other.name}` | {happens} | {other.meaning} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """The page with both tables as they should be; raises ValueError where a marker is missing."""
    for name, table in (("settings", settings_table()), ("others", others_table())):
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not begin or not end:
            raise ValueError(f"the markers of {name} are missing")
        text = f"{before}{begin}{table}\n{end}{after}"
    return text


def _default(value: object) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
