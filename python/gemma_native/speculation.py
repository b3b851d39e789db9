"""Guesses at the next tokens from what the text holds already (prompt lookup), checked several at a time.

A step that checks guesses reads the weights once for all of them, and the rows of a pass have the same bits as single steps,
so that the output is the same token for token: a right guess is only sooner. Where the last three tokens stood before, the tokens that
followed then are guessed.

A step with wrong guesses takes longer than one without. What that costs is measured and kept below MOST_LOST of the time, by leaving
guesses out until they can be afforded.
"""

from __future__ import annotations

from collections.abc import Iterable

LOOK = 3  # tokens that must match
MOST = 7  # guesses a step: with the token before them, the rows that one pass over the head serves
MOST_LOST = 0.03


class Guesses:
    """The text of one sequence, and whether guessing pays."""

    def __init__(self, text: Iterable[int]) -> None:
        self.guessed = self.right = 0
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # LOOK tokens -> where they last ended, but for the text's end
        self._many = LOOK
        self._plain = 0.0  # seconds of a step without guesses, smoothed
        self._extra = 0.5  # of which a step with guesses took more, smoothed
        self._total = 0.0  # seconds of all steps
        self._lost = 0.0  # those that guessing has cost; negative: won
        for token in text:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self._text) >= LOOK:
            self._after[tuple(self._text[-LOOK:])] = len(self._text)
        self._text.append(token)

    def next(self, most: int) -> list[int]:
        """Up to `most` guesses; none where nothing matches or where they cost too much."""
        at = self._after.get(tuple(self._text[-LOOK:]))
        most = min(most, self._many)
        if at is None or most < 1 or not self._plain:
            return []
        if self._lost + self._extra * self._plain > MOST_LOST * self._total:
            return []
        return self._text[at : at + most]

    def took(self, seconds: float, guessed: int, right: int) -> None:
        """A step with so many guesses, of which so many were right, took so long."""
        self._total += seconds
        if not guessed:
            self._plain = 0.8 * self._plain + 0.2 * seconds if self._plain else seconds
            return
        self.guessed += guessed
        self.right += right
        self._extra = 0.8 * self._extra + 0.2 * max(0.0, seconds / self._plain - 1)
        # Old wins do not pay for long losses.
        self._lost = max(self._lost + seconds - (1 + right) * self._plain, -10 * self._plain)
        self._many = min(MOST, 2 * right + 1) if right == guessed else max(2, right + 1)
