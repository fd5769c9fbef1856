"""What the operators' tests share: READMEs as data, and launches with a sync statement left out."""

from decimal import Decimal

import pytest

from ascend_kernels.host.harness import CheckFailed


class Readme:
    def __init__(self, path):
        self._text = path.read_text(encoding="utf-8")

    def table(self, first):
        """Rows of cells, as text, of the table whose first column has this header."""
        lines = self._text.split(f"\n| {first} |", 1)[1].split("\n\n", 1)[0].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]

    @staticmethod
    def number(cell):
        return Decimal(cell.replace(" ", ""))

    def says(self, cells, values):
        """Whether the values, rounded to the digits of the cells, are the cells."""
        numbers = [self.number(cell) for cell in cells]
        return numbers == [round(Decimal(value), -number.as_tuple().exponent)
                           for number, value in zip(numbers, values, strict=True)]


@pytest.fixture
def readme(request):
    """The README of the test module's operator, OP."""
    return Readme(request.module.OP / "README.md")


def uncaught_syncs(launches):
    """Sync statements that can be left out of all launches without breaking a rule of the model, and their number.

    launches: (removable Kernel, function that launches it, with removed_sync as its option). A statement of a header
    that one launch does not need must be needed by another.
    """
    uncaught = {}
    for kernel, launch in launches:
        launch()
        for index, statement in enumerate(kernel.sync_statements):
            if not uncaught.setdefault(statement, True):
                continue
            try:
                launch(removed_sync=index)
            except CheckFailed:
                uncaught[statement] = False
    return [statement for statement, missed in uncaught.items() if missed], len(uncaught)


@pytest.fixture(name="uncaught_syncs")
def _uncaught_syncs():
    return uncaught_syncs
