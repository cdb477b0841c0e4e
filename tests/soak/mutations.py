"""All mutations, and stores made by a few of them."""

from tests.soak.accidents import cut, flip, linked_folder, lose, misplaced, shuffle_lines, sparse, stray
from tests.soak.authors import (
    author_header,
    author_length,
    author_line,
    author_parquet,
    author_store,
    author_table,
    author_tensor,
    raw_store,
)
from tests.soak.case import Case, Pick, Seed

ACCIDENTS = (flip, cut, lose, shuffle_lines)
AUTHORS = (
    author_line, author_store, raw_store, author_header, author_length, author_tensor, author_parquet, author_table,
)  # fmt: skip
LAYOUTS = (stray, misplaced, linked_folder, sparse)
MUTATIONS = (*ACCIDENTS, *AUTHORS, *LAYOUTS)


def mutate(seed: Seed, pick: Pick, most: int = 3) -> Case:
    """Return the sound store after a few mutations."""
    case = seed.case()
    for _ in range(pick.randint(1, most)):
        mutation = pick.choice((*MUTATIONS, *AUTHORS))
        case.told.append(mutation.__name__)
        try:
            mutation(case, pick)
        except (KeyError, TypeError, ValueError, AttributeError):
            # What earlier mutations left may be too far gone to be changed as if it were sound.
            if len(case.told) == 1:
                raise
    return case
