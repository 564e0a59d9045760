"""The log-probabilities in `meta_info` of /generate: lists of [logprob, token id, text or null]."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hornbeam.core.request import LogprobOptions, TokenLogprobs
from hornbeam.engine.stream import Delta


class LogprobAnswer:
    """What has been told of one request's log-probabilities.

    Args:
        options: what it asked for.
        prompt_ids: its prompt.
        text_of: a token's text; None: texts are null.
    """

    def __init__(
        self, options: LogprobOptions, prompt_ids: tuple[int, ...], text_of: Callable[[int], str] | None
    ) -> None:
        self._options = options
        self._text_of = text_of
        self._num_output = 0
        scored = () if options.start is None else prompt_ids[options.start :]
        self._unscored = list(scored[:0:-1])  # the prompt's tokens whose logprobs are to come, the next one last
        self._input, self._output = self._lists(), self._lists()
        if scored:  # nothing tells the logprob of the first one
            self._input["token"].append([None, scored[0], self._text(scored[0])])
            for name in self._input.keys() - {"token"}:
                self._input[name].append(None)

    def add(self, delta: Delta, *, fresh: bool) -> dict[str, Any]:
        """The entries of `meta_info` after `delta`. `fresh`: those of generated tokens hold only what is new."""
        if fresh:
            self._output = self._lists()
        self._num_output += len(delta.logprobs)
        for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True):
            self._append(self._output, token_id, entry)
        for entry in delta.input_logprobs:
            self._append(self._input, self._unscored.pop(), entry)
        return {
            "output_token_logprobs_length": self._num_output,
            **{f"input_{name}_logprobs": list(entries) for name, entries in self._input.items()},
            **{f"output_{name}_logprobs": list(entries) for name, entries in self._output.items()},
        }

    def _lists(self) -> dict[str, list[Any]]:
        """Of the tokens themselves, of the likeliest ones, of those asked for."""
        wanted = {"token": True, "top": self._options.num_top > 0, "token_ids": bool(self._options.token_ids)}
        return {name: [] for name, is_wanted in wanted.items() if is_wanted}

    def _append(self, lists: dict[str, list[Any]], token_id: int, entry: TokenLogprobs) -> None:
        asked = zip(self._options.token_ids, entry.asked, strict=True)
        found: Mapping[str, Iterable[tuple[int, float]]] = {
            "token": [(token_id, entry.chosen)],
            "top": entry.top,
            "token_ids": asked,
        }
        for name, entries in lists.items():
            triples = [[logprob, found_id, self._text(found_id)] for found_id, logprob in found[name]]
            entries.append(triples[0] if name == "token" else triples)

    def _text(self, token_id: int) -> str | None:
        return None if self._text_of is None else self._text_of(token_id)
