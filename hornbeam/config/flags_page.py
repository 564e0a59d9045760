"""docs/flags.md, made of the table of flags: `python -m hornbeam.config.flags_page > docs/flags.md`."""

import sys

from hornbeam.config.absent import ABSENT, ALWAYS, dashed
from hornbeam.config.environment import VARIABLES, read_environment
from hornbeam.config.flags import FLAGS, GROUPS, Flag

_HEAD = """\
# Flags of `hornbeam serve`

Made by `make docs` from `hornbeam/config/flags.py`; do not edit. `hornbeam.Engine(**flags)` takes the same names with
underscores. On the command line a flag may be shortened as long as it stays unique (`--mem-fraction`), whole numbers
may end in k and m (thousands, millions) or K and M (1024, 1024 x 1024), and `--config FILE.yaml` reads flags from a
file, which those on the command line override:

```yaml
model-path: path/to/model
port: 8000
cuda-graph-bs: [1, 2, 4, 8]
```

"auto", or no default, means that the value is derived from the model and the machine; the server's log says from what.
"""
_ABSENT = """\
## Flags of SGLang that do not exist yet

They are refused by name, unless the value given asks for nothing new: the one in the table's second column.

| flag | accepted | why it is refused otherwise | nearest |
|---|---|---|---|
"""


def flags_page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    for group, what in GROUPS.items():
        parts.append(f"\n## {group.capitalize()}\n\n{what}\n\n| flag | default | meaning |\n|---|---|---|\n")
        parts += [_row(flag) for flag in FLAGS if flag.group == group]
    parts.append(f"\n## Environment\n\nRead once, at the start: {', '.join(f'`{name}`' for name in VARIABLES)}.\n")
    parts.append(_environment())
    parts.append(f"\n{_ABSENT}")
    for name, absent in sorted(ABSENT.items()):
        neutral = absent.neutral
        accepted = "any value" if neutral == ALWAYS else f"`{neutral}`" if neutral not in (None, False, "") else ""
        near = ", ".join(f"`{dashed(flag)}`" for flag in absent.nearest.split(", ") if flag)
        parts.append(f"| `{dashed(name)}` | {accepted} | {absent.reason} | {near} |\n")
    return "".join(parts)


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{dashed(name)}`" for name in (flag.name, *flag.aliases))
    values = " ".join(f"`{choice}`" for choice in flag.choices) or ("" if flag.type is bool else flag.type.__name__)
    default = "" if flag.default is None else "off" if flag.default is False else f"`{flag.default}`"
    several = ", several" if flag.many else ""
    meaning = f"{flag.help} ({values}{several})" if values else flag.help
    return f"| {names} | {default} | {meaning} |\n".replace("  ", " ")


def _environment() -> str:
    """What `read_environment` tells about them."""
    text = (read_environment.__doc__ or "").partition("Raises:")[0]
    return "\n" + "\n".join(line.strip() for line in text.strip().splitlines()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(flags_page())
