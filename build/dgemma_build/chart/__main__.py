"""Command line: python -m dgemma_build.chart checks chart and samples; --write first makes again what is generated."""

from __future__ import annotations

import argparse
import sys

from dgemma_build.chart.cases import check, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.chart", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the golden renders and the README's table first")
    if parser.parse_args().write:
        write()
    report = check()
    for problem in report.problems:
        print(problem, file=sys.stderr)
    print(f"{report.cases} cases, {report.objects} objects, {report.values} values, {len(report.problems)} problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
