"""Prefill of latent attention: expanded or absorbed, whichever is cheaper for each row's lengths.

Expanded, the keys and values of a step's own tokens are made at once; those of cached prefixes in chunks of bounded
size, and the parts are merged by their log-sum-exps. Knows the arithmetic, not the kernels: they come as a `Ragged`,
and as a plan of absorbed attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from hornbeam.core.family import LatentSizes
from hornbeam.ops.attention.contract import AttentionShape, LatentAttend, Rows
from hornbeam.ops.mla.contract import Ragged, RaggedAttend, Stretch

_CHUNK_BYTES = 2**29  # of the expanded keys and values of a chunk
_FLOPS_PER_BYTE = 180  # that a device computes in the time in which it reads or writes a byte: 790 T over 4.3 T

_Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # see `LatentAttend`


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Tokens of a row's cached prefix."""

    row: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Pieces of prefixes, the queries that see them, and where the pieces lie."""

    queries: slice  # among the step's tokens
    cells: Tensor  # [keys] int64: page * page size + offset
    attend: RaggedAttend


class LatentPrefill:
    """Plans the prefill part of steps, for one lane."""

    def __init__(
        self,
        shape: AttentionShape,
        ragged: Ragged,
        absorbed: Callable[[Rows], LatentAttend],
        most_absorbed: int | None = None,
    ) -> None:
        """`most_absorbed`: queries of a step that `absorbed` can plan for; None: any number."""
        assert shape.latent is not None
        self._shape = shape
        self._sizes = shape.latent
        self._ragged = ragged
        self._absorbed = absorbed
        self._most_absorbed = most_absorbed

    def plan(self, rows: Rows) -> LatentAttend:
        """For rows with any numbers of queries; their length bounds are exact."""
        query_lens, itemsize = list(rows.query_lens), self._shape.dtype.itemsize
        prefix_lens = [bound - num for bound, num in zip(rows.len_bounds, query_lens, strict=True)]
        absorbed = rows_to_absorb(self._sizes, itemsize, query_lens, prefix_lens, self._most_absorbed)
        if len(absorbed) == len(query_lens):
            return self._absorbed(rows)
        for row in absorbed:
            prefix_lens[row] = 0
        expanded = self._plan_expanded(rows, query_lens, prefix_lens)
        run = self._run_both(expanded, rows, absorbed) if absorbed else expanded
        return LatentAttend(absorbed=False, run=run)

    def _plan_expanded(self, rows: Rows, query_lens: list[int], prefix_lens: list[int]) -> _Run:
        token_bytes = self._shape.num_heads * _expanded_size(self._sizes) * self._shape.dtype.itemsize
        chunks = list(_chunks(prefix_lens, max(1, _CHUNK_BYTES // token_bytes)))
        begins = list(accumulate(query_lens, initial=0))
        stretches = [Stretch(query_lens=query_lens, key_lens=query_lens, causal=True)]
        for pieces in chunks:
            lens = [0] * (pieces[-1].row + 1 - pieces[0].row)
            for piece in pieces:
                lens[piece.row - pieces[0].row] = piece.length
            mine = query_lens[pieces[0].row : pieces[-1].row + 1]
            stretches.append(Stretch(query_lens=mine, key_lens=lens, causal=False))
        fresh, *attends = self._ragged.plan(stretches)
        planned = [
            _Chunk(
                queries=slice(begins[pieces[0].row], begins[pieces[-1].row + 1]),
                cells=self._cells(rows, pieces),
                attend=attend,
            )
            for pieces, attend in zip(chunks, attends, strict=True)
        ]
        return self._run_expanded(fresh, planned)

    def _run_both(self, expanded: _Run, rows: Rows, absorbed: Sequence[int]) -> _Run:
        """All rows expanded, then what the absorbed ones have got is written over."""
        ids = torch.tensor(absorbed).to(self._shape.device, non_blocking=True)
        begins = list(accumulate(rows.query_lens, initial=0))
        lens = [rows.query_lens[row] for row in absorbed]
        bounds = [rows.len_bounds[row] for row in absorbed]
        some = replace(rows, slots=rows.slots[ids], lens=rows.lens[ids], len_bounds=bounds, query_lens=lens)
        attend = self._absorbed(some).run
        begin, end = begins[absorbed[0]], begins[absorbed[-1] + 1]
        tokens: slice | Tensor = slice(begin, end)
        if sum(lens) < end - begin:  # others stand between them
            pieces = [_Piece(row=row, start=begins[row], length=num) for row, num in zip(absorbed, lens, strict=True)]
            _, tokens = self._tokens(pieces)
        nope_dim, rank = self._sizes.nope_dim, self._sizes.rank

        def run(q: Tensor, row: Tensor, pages: Tensor, up: Tensor) -> Tensor:
            out = expanded(q, row, pages, up)
            queries = q[tokens]
            wide = q.new_empty(*queries.shape[:2], self._shape.head_dim)
            wide[..., rank:] = queries[..., nope_dim:]
            torch.bmm(queries[..., :nope_dim].transpose(0, 1), up[:, :nope_dim], out=wide[..., :rank].transpose(0, 1))
            out[tokens] = attend(wide, row, pages, up)
            return out

        return run

    def _run_expanded(self, fresh: RaggedAttend, chunks: Sequence[_Chunk]) -> _Run:
        def run(q: Tensor, row: Tensor, pages: Tensor, up: Tensor) -> Tensor:
            out, lse = fresh(q, *self._expand(row, up))
            for chunk in chunks:
                keys, values = self._expand(pages.flatten(0, 2).index_select(0, chunk.cells), up)
                part = chunk.attend(q[chunk.queries], keys, values)
                self._ragged.merge(out[chunk.queries], lse[chunk.queries], *part)
            return out

        return run

    def _expand(self, rows: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, C + R] -> keys [n, Hq, N + R] and values [n, Hq, V]."""
        sizes, num_heads = self._sizes, len(up)
        keys = rows.new_empty(len(rows), num_heads, sizes.nope_dim + sizes.rope_dim)
        values = rows.new_empty(len(rows), num_heads, sizes.value_dim)
        latents = rows[:, : sizes.rank].expand(num_heads, -1, -1)
        for_keys, for_values = up.split((sizes.nope_dim, sizes.value_dim), 1)
        torch.bmm(latents, for_keys.transpose(1, 2), out=keys[..., : sizes.nope_dim].transpose(0, 1))
        torch.bmm(latents, for_values.transpose(1, 2), out=values.transpose(0, 1))
        keys[..., sizes.nope_dim :] = rows[:, None, sizes.rank :]
        return keys, values

    def _cells(self, rows: Rows, pieces: Sequence[_Piece]) -> Tensor:
        """Where the tokens of pieces lie in the cache, one piece after the other: [tokens] int64."""
        row, positions = self._tokens(pieces)
        pages = rows.page_tables[rows.slots[row], positions // self._shape.page_size]
        return pages * self._shape.page_size + positions % self._shape.page_size

    def _tokens(self, pieces: Sequence[_Piece]) -> tuple[Tensor, Tensor]:
        """The row and the place of each token of pieces, one piece after the other: [tokens] int64."""
        begins = accumulate((piece.length for piece in pieces), initial=0)
        table = [(piece.row, piece.start - begin, piece.length) for piece, begin in zip(pieces, begins, strict=False)]
        device, num_tokens = self._shape.device, sum(piece.length for piece in pieces)
        fields = torch.tensor(table).to(device, non_blocking=True)
        row, shift, _ = fields.repeat_interleave(fields[:, 2], dim=0, output_size=num_tokens).unbind(1)
        return row, shift + torch.arange(num_tokens, device=device)


def values_of(latents: Tensor, up: Tensor, shape: AttentionShape) -> Tensor:
    """What absorbed attention gathered, [T, Hq, C] -> values [T, Hq, V]."""
    assert shape.latent is not None
    for_values = up[:, shape.latent.nope_dim :]
    out = latents.new_empty(len(latents), len(up), shape.latent.value_dim)
    torch.bmm(latents.transpose(0, 1), for_values.transpose(1, 2), out=out.transpose(0, 1))
    return out


def rows_to_absorb(
    sizes: LatentSizes, itemsize: int, query_lens: Sequence[int], prefix_lens: Sequence[int], most: int | None
) -> list[int]:
    """The rows of a step that cost less absorbed than expanded, with at most so many queries in all (None: any).

    To expand a step's own tokens takes as much as to absorb its queries and results, so what differs is attention
    itself, 2 (2 C + R) flops for each query, key and head against 2 (N + R + V), and the prefixes: 2 C (N + V) flops
    per token and head, and that keys and values are written once and read at least once. Beside rows that are
    expanded, the own tokens of absorbed ones are so, too.
    """
    token = 2 * sizes.rank * (sizes.nope_dim + sizes.value_dim)
    token += 2 * _expanded_size(sizes) * itemsize * _FLOPS_PER_BYTE
    rows, absorbed, both, num_queries = list[int](), 0, 0, 0
    for row, (num, prefix) in enumerate(zip(query_lens, prefix_lens, strict=True)):
        pairs = num * prefix + num * (num + 1) // 2
        alone, expanded = pairs * 2 * (2 * sizes.rank + sizes.rope_dim), pairs * 2 * _expanded_size(sizes)
        expanded += prefix * token
        beside = alone + num * token
        if beside < expanded and (most is None or num_queries + num <= most):
            rows.append(row)
            num_queries += num
        absorbed += alone
        both += min(beside, expanded)
    fits = most is None or sum(query_lens) <= most
    return list(range(len(query_lens))) if fits and absorbed < both else rows


def _expanded_size(sizes: LatentSizes) -> int:
    """Features of a head's key and value."""
    return sizes.nope_dim + sizes.rope_dim + sizes.value_dim


def _chunks(prefix_lens: Sequence[int], most_tokens: int) -> list[list[_Piece]]:
    """All prefixes in order, cut into chunks of at most `most_tokens`."""
    chunks: list[list[_Piece]] = []
    room = 0
    for row, length in enumerate(prefix_lens):
        start = 0
        while start < length:
            if not room:
                chunks.append([])
                room = most_tokens
            taken = min(room, length - start)
            chunks[-1].append(_Piece(row=row, start=start, length=taken))
            start, room = start + taken, room - taken
    return chunks
