"""The log-probabilities in `meta_info` of /generate: lists of [logprob, token id, text or null]."""

from collections.abc import Callable, Iterable
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
        self._scored_ids = () if options.start is None else prompt_ids[options.start :]
        self._input = self._lists()
        self._output = self._lists()
        if self._scored_ids:
            # Nothing stands before the first one that could tell its logprob.
            self._input[""].append([None, self._scored_ids[0], self._text(self._scored_ids[0])])
            for name in self._input.keys() - {""}:
                self._input[name].append(None)

    def add(self, delta: Delta, *, fresh: bool) -> dict[str, Any]:
        """The entries of `meta_info` after `delta`. `fresh`: those of generated tokens hold only what is new."""
        if fresh:
            self._output = self._lists()
        self._num_output += len(delta.logprobs)
        self._extend(self._output, delta.token_ids, delta.logprobs)
        self._extend(self._input, self._scored_ids[len(self._input[""]) :], delta.input_logprobs)
        meta: dict[str, Any] = {"output_token_logprobs_length": self._num_output}
        for kind, lists in (("input", self._input), ("output", self._output)):
            meta |= {f"{kind}_{name or 'token'}_logprobs": list(values) for name, values in lists.items()}
        return meta

    def _lists(self) -> dict[str, list[Any]]:
        """Of the tokens themselves, the likeliest ones and the ones asked for."""
        names = {"": True, "top": self._options.num_top > 0, "token_ids": bool(self._options.token_ids)}
        return {name: [] for name, wanted in names.items() if wanted}

    def _extend(
        self, lists: dict[str, list[Any]], token_ids: tuple[int, ...], entries: tuple[TokenLogprobs, ...]
    ) -> None:
        for token_id, entry in zip(token_ids, entries, strict=False):
            lists[""] += self._triples([(token_id, entry.chosen)])
            if "top" in lists:
                lists["top"].append(self._triples(entry.top))
            if "token_ids" in lists:
                lists["token_ids"].append(self._triples(zip(self._options.token_ids, entry.asked, strict=True)))

    def _triples(self, pairs: Iterable[tuple[int, float]]) -> list[list[Any]]:
        return [[logprob, token_id, self._text(token_id)] for token_id, logprob in pairs]

    def _text(self, token_id: int) -> str | None:
        return None if self._text_of is None else self._text_of(token_id)
