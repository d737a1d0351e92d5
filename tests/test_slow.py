"""The list of slow tests names tests that exist."""

import re

from tests.conftest import ROOT
from tests.slow import SLOW


def test_every_slow_test_exists():
    for name in SLOW:
        file, _, function = name.partition("::")
        if not function:
            assert (ROOT / file).is_file(), name
            continue
        definition = rf"^def {re.escape(function.partition('[')[0])}"
        assert re.search(definition, (ROOT / file).read_text(), re.MULTILINE), name
