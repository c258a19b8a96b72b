"""The part of a graph that belongs to a matmul: lines before and after, side by side."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

from fxint4.report.graph_text import calls, defined_by, operands_of

__all__ = ["LinePair", "aligned", "excerpts"]

#: Most changed lines shown around a matmul; with more, only those from its weight to it.
_LINES_SHOWN = 40

#: A line of the graph before and the one beside it after; None for no line, twice None for a gap.
LinePair: TypeAlias = tuple[str | None, str | None]


def excerpts(report: Mapping[str, Any]) -> list[list[LinePair]]:
    """Return the lines of each record's part of its graph; none where no graph has its weight.

    The n-th record of a weight and op belongs to the n-th matmul of that kind in the graph.
    """
    graphs = [
        _Graph(graph.get("before") or "", graph.get("after") or "")
        for graph in report.get("graphs") or ()
    ]
    seen: dict[tuple[int, tuple[str, ...], str], int] = {}
    found: list[list[LinePair]] = []
    for record in report.get("records") or ():
        index = record.get("graph", -1)
        if not 0 <= index < len(graphs):
            found.append([])
            continue
        parameters, op = tuple(record.get("parameters") or ()), str(record.get("op") or "")
        chains = graphs[index].matmuls(parameters, op)
        number = seen.get((index, parameters, op), 0)
        seen[index, parameters, op] = number + 1
        found.append(graphs[index].excerpt(chains[min(number, len(chains) - 1)]) if chains else [])
    return found


def aligned(before: Sequence[str], after: Sequence[str]) -> list[LinePair]:
    """Return lines side by side: equal ones as one pair, the others in their order.

    No line may be twice on one side.
    """
    graph = _Graph("\n".join(before), "\n".join(after))
    new = set(range(len(graph.after))).difference(graph.same_after)
    return graph.pairs(set(range(len(graph.before))), new)


class _Graph:
    """The texts of a graph before and after, and which of their lines are the same.

    Lines are given by their numbers, from 0.

    Attributes:
        before: Lines of the captured graph.
        after: Lines of the rewritten graph.
        same: Pairs of numbers of equal lines (before, after), in rising order.
        same_after: The second numbers of `same`.
        defined: The line of `before` that defines a name.
        defined_after: The line of `after` that defines a name.
        users: The lines of `before` that read a name.
    """

    def __init__(self, before: str, after: str) -> None:
        self.before, self.after = before.splitlines(), after.splitlines()
        self.same = _same_lines(self.before, self.after)
        self.same_after = [number for _, number in self.same]
        self.defined = {defined_by(line): number for number, line in enumerate(self.before)}
        self.defined_after = {defined_by(line): number for number, line in enumerate(self.after)}
        self.users: dict[str, list[int]] = {}
        for number, line in enumerate(self.before):
            for name in operands_of(line):
                self.users.setdefault(name, []).append(number)

    def matmuls(self, parameters: Sequence[str], op: str) -> list[list[int]]:
        """Return, for each matmul by a weight, the lines of `before` from the weight to it.

        Args:
            parameters: Names of the parameters that the weight is made of.
            op: The op of the matmul, such as "addmm".
        """
        reached = {f"%{name}" for name in parameters if f"%{name}" in self.defined}
        chain = sorted(self.defined[name] for name in reached)
        waiting, ends = set(reached), set()
        while waiting:
            for number in self.users.get(waiting.pop(), ()):
                line = self.before[number]
                if operands_of(line) <= reached:  # still a computation on the weight alone
                    if defined_by(line) not in reached:
                        reached.add(defined_by(line))
                        waiting.add(defined_by(line))
                        chain.append(number)
                else:
                    ends.add(number)
        # A computation whose other operands were reached later is no end.
        found = sorted(end for end in ends if not operands_of(self.before[end]) <= reached)
        matmuls = [end for end in found if calls(self.before[end], op)]
        return [[*chain, end] for end in matmuls or found[:1]]

    def excerpt(self, chain: Sequence[int]) -> list[LinePair]:
        """Return the rows of one matmul's part of the graph.

        Args:
            chain: The lines of `before` from its weight to it, see `matmuls`.
        """
        end = chain[-1]
        place = bisect_left(self.same, (end, -1))
        first, first_after = self.same[place - 1] if place else (-1, -1)
        stop, stop_after = (
            self.same[place] if place < len(self.same) else (len(self.before), len(self.after))
        )
        if stop == end:  # the matmul itself is unchanged: its neighbours are the context
            first, stop = max(end - 2, -1), min(end + 2, len(self.before))
            lines, lines_after = {*chain, *range(first + 1, stop)}, set[int]()
        else:
            lines = {*chain, *range(max(first, 0), min(stop + 1, len(self.before)))}
            if len(lines) > _LINES_SHOWN:
                lines = set(chain)
            lines_after = self._with_operands(range(first_after + 1, stop_after))
        return self.pairs(lines, lines_after)

    def _with_operands(self, numbers: Iterable[int]) -> set[int]:
        """Return lines of `after` that are new, and the new lines that they depend on."""
        found: set[int] = set()
        waiting = list(numbers)
        while waiting and len(found) < _LINES_SHOWN:
            number = waiting.pop(0)
            if number in found or self._is_same(number):
                continue
            found.add(number)
            operands = sorted(operands_of(self.after[number]))
            waiting += [self.defined_after[name] for name in operands if name in self.defined_after]
        return found

    def _is_same(self, number: int) -> bool:
        """Whether a line of `after` is in `before` too."""
        place = bisect_left(self.same_after, number)
        return place < len(self.same) and self.same_after[place] == number

    def pairs(self, before: set[int], after: set[int]) -> list[LinePair]:
        """Return chosen lines side by side: equal ones in one row, changed ones in their order."""
        stretches: dict[int, tuple[list[int], list[int]]] = {}
        pairs: set[int] = set()  # positions in `same`
        for number in sorted(before):
            place = bisect_left(self.same, (number, -1))
            if place < len(self.same) and self.same[place][0] == number:
                pairs.add(place)
            else:
                stretches.setdefault(place, ([], []))[0].append(number)
        for number in sorted(after):
            stretches.setdefault(bisect_left(self.same_after, number), ([], []))[1].append(number)
        numbers: list[tuple[int | None, int | None]] = []
        removed: list[int] = []
        added: list[int] = []
        for place in sorted({*stretches, *pairs}):
            lines_before, lines_after = stretches.get(place, ((), ()))
            removed += lines_before
            added += lines_after
            if place in pairs:
                numbers += [*zip_longest(removed, added), self.same[place]]
                removed, added = [], []
        numbers += zip_longest(removed, added)
        rows: list[LinePair] = []
        last: tuple[int | None, int | None] = (None, None)
        for row in numbers:
            if any(
                new is not None and old is not None and new > old + 1
                for new, old in zip(row, last, strict=True)
            ):
                rows.append((None, None))
            rows.append(
                (
                    None if row[0] is None else self.before[row[0]],
                    None if row[1] is None else self.after[row[1]],
                )
            )
            last = (
                row[0] if row[0] is not None else last[0],
                row[1] if row[1] is not None else last[1],
            )
        return rows


def _same_lines(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Return the numbers (before, after) of the longest sequence of lines that both texts have.

    A graph has no line twice, so this is a longest increasing subsequence of positions.
    """
    places = {line: number for number, line in enumerate(after)}
    ends: list[int] = []  # for each length, the lowest position that a sequence ends with
    chosen: list[tuple[int, int]] = []  # for each length, the pair that does
    previous: dict[tuple[int, int], tuple[int, int] | None] = {}
    for number, line in enumerate(before):
        if line not in places:
            continue
        pair = (number, places[line])
        length = bisect_left(ends, pair[1])
        previous[pair] = chosen[length - 1] if length else None
        ends[length : length + 1] = [pair[1]]
        chosen[length : length + 1] = [pair]
    pairs = []
    last = chosen[-1] if chosen else None
    while last is not None:
        pairs.append(last)
        last = previous[last]
    return pairs[::-1]
