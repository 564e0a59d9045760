"""Run as a script: makes modules unimportable, generates with `hornbeam.Engine`, then asks for each family.

Prints JSON: {"output_ids": [...], "refusals": {architecture: [family, cause]}}.
"""

import importlib.abc
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec


class Poison(importlib.abc.MetaPathFinder):
    """Importing one of `modules`, or what is inside, raises."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = tuple(modules)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if any(name == module or name.startswith(f"{module}.") for module in self._modules):
            raise RuntimeError(f"{name} is poisoned")
        return None


def main(checkpoint: str, poisoned: list[str], architectures: list[str]) -> None:
    sys.meta_path.insert(0, Poison(poisoned))

    import hornbeam
    from hornbeam.core.errors import FamilyUnavailable
    from hornbeam.models.index import find_family

    engine = hornbeam.Engine(model_path=checkpoint, max_total_tokens=1024, log_level="error")
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    output_ids = engine.generate("The capital of France", sampling)["output_ids"]
    engine.shutdown()
    refusals = {}
    for architecture in architectures:
        try:
            find_family({"architectures": [architecture]})
        except FamilyUnavailable as error:
            refusals[architecture] = [error.family, str(error.cause)]
    print(json.dumps({"output_ids": output_ids, "refusals": refusals}))


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:]))
