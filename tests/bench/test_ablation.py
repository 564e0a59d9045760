import pytest

from hornbeam.bench.ablation import EXTRAS, PARTS
from hornbeam.config.flags import FLAGS
from hornbeam.serve.cli import FlagParser

pytestmark = pytest.mark.pure


def test_each_part_is_switched_by_flags_that_exist():
    defaults = {flag.name: flag.default for flag in FLAGS}
    for part, arguments in {**PARTS, **EXTRAS}.items():
        parser = FlagParser("ablation", "")
        parser.add_flags()
        values = parser.parse_flags(list(arguments))
        changed = {name for name, value in values.items() if value not in (None, defaults.get(name))}
        assert changed, part
