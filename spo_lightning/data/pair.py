"""One tokenised pair: a prompt, two answers, and what is known of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One tokenised pair. ``row`` is its place in the source, for messages.

    An answer may hold context, tokens that are read and not scored: a user's turn between two of
    the assistant's. ``chosen_context``: where one begins, ends, the next begins, ends, and so on.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    row: int = -1
    chosen_context: tuple[int, ...] = ()
    rejected_context: tuple[int, ...] = ()
    margin: float | None = None  # the data's: chosen's score less rejected's, or a strength
    reference_side: float | None = None  # of two answers the reference's own: 0 chosen, 1 rejected
    # where the chosen answer's sentences end, and how near each is to the prompt: where asked for
    sentences: tuple[int, ...] = ()
    similarities: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def scored(self) -> tuple[list[range], list[range]]:
        """The places of the scored tokens in the chosen and in the rejected answer, in runs."""
        return (
            _between(len(self.chosen), self.chosen_context),
            _between(len(self.rejected), self.rejected_context),
        )


def _between(length: int, context: tuple[int, ...]) -> list[range]:
    edges = (0, *context, length)
    return [range(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]
